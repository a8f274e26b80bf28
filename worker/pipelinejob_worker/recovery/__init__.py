"""Recovery: snapshots that outlive a worker, their copies, and how the agents agree on the step to go on from."""
