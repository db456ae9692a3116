"""A sweep's settings in Ray Tune's terms; meets Ray, beside `run.py`, as schedulers and stoppers are its classes."""
