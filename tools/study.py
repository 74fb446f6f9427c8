#!/usr/bin/env python
"""The command ``raftmlp study`` as a script."""

from raftmlp_cli import main

if __name__ == "__main__":
    main("study")
