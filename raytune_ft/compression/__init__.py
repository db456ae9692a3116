"""A model to a smaller model."""
