"""A dataset to a model."""
