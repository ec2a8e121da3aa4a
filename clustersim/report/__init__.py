"""How it is shown: terminal and pages."""
