#!/usr/bin/env python
"""The command ``raftmlp benchmark`` as a script."""

from raftmlp_cli import main

if __name__ == "__main__":
    main("benchmark")
