"""GPUs, servers and models by name, each number with its source; read by `spec/references.py`."""
