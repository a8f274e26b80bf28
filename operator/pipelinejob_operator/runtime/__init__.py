"""The only rooms that talk to the cluster: client, watch, cache, queue, leader."""
