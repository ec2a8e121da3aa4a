"""Questions: run, preview, examples."""
