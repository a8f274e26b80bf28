"""Process 1 of a stage pod: no torch; supervises the worker, obeys the membership, serves the status."""
