"""End to end with the real Kueue."""
