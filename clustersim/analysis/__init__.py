"""What it means: a trace to tables and figures."""
