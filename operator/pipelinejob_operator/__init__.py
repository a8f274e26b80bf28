"""The operator: what it decides, what it builds, and how it speaks with the cluster."""
