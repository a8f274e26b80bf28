"""Where stages should run. Pure."""
