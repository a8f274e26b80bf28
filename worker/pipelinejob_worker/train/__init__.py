"""Training: the worker process of a stage."""
