"""A model to a report."""
