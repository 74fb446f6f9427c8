#!/usr/bin/env python
"""The command ``raftmlp train-mm`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.train_mm import main

if __name__ == "__main__":
    run(main)
