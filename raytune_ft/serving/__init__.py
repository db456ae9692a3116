"""A model to an endpoint."""
