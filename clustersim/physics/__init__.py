"""How long it takes: prices of operators and the network model. No processes, no clock of its own."""
