"""The OpenAI-compatible API of a Serve job: pods of their own, without torch, that hold the accepted requests."""
