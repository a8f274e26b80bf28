"""The engine of a Serve job: stages that generate tokens for many requests at once."""
