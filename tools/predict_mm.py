#!/usr/bin/env python
"""The command ``raftmlp predict-mm`` as a script."""

from raftmlp_cli import main

if __name__ == "__main__":
    main("predict-mm")
