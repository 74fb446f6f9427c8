#!/usr/bin/env python
"""The command ``raftmlp scenes`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.scenes import main

if __name__ == "__main__":
    run(main)
