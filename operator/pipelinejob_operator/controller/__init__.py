"""From one look at a job to what is done about it: observe, plan, execute, tell."""
