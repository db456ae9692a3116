"""The quickstart: customer orders to JSON, small enough to fine-tune on two CPU cores in minutes."""
