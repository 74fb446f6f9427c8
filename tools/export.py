#!/usr/bin/env python
"""The command ``raftmlp export`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.export import main

if __name__ == "__main__":
    run(main)
