#!/usr/bin/env python
"""The command ``raftmlp predict`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.predict import main

if __name__ == "__main__":
    run(main)
