"""Pure builders of the manifests that a job consists of."""
