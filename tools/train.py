#!/usr/bin/env python
"""The command ``raftmlp train`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.train import main

if __name__ == "__main__":
    run(main)
