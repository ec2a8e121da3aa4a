"""`python -m clustersim.cli`."""

from __future__ import annotations

from clustersim.cli import main

if __name__ == "__main__":
    main()
