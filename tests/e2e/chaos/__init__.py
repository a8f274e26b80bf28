"""Real faults at chosen moments of a job that trains, and what must hold after each: docs/how-to/chaos.md."""
