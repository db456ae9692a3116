"""Shipped questions and passages, by which forgetting is told."""
