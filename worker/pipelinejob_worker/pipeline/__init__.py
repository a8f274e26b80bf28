"""The pipeline itself: process group, partition, stage and schedule."""
