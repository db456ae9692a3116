"""Records to a training-ready dataset."""
