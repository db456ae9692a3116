"""The story: prepare, search, train, evaluate, quantize and serve, from one file of settings."""
