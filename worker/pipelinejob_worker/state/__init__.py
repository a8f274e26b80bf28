"""What survives a worker: checkpoints and the history of losses."""
