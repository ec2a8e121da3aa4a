"""When it happens: the only room with a clock, and the only one that imports SimPy."""
