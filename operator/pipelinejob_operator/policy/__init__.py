"""The rules: each file answers one question about a job, purely."""
