"""What was asked: frozen, strict values without behaviour, and the reading of them from TOML."""
