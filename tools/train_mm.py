#!/usr/bin/env python
"""The command ``raftmlp train-mm`` as a script."""

from raftmlp_cli import main

if __name__ == "__main__":
    main("train-mm")
