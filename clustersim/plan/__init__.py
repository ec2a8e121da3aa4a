"""What must be done: pure functions from a scenario to step graphs. No time."""
