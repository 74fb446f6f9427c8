#!/usr/bin/env python
"""The command ``raftmlp validate`` as a script."""

from raftmlp_cli import main

if __name__ == "__main__":
    main("validate")
