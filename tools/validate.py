#!/usr/bin/env python
"""The command ``raftmlp validate`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.validate import main

if __name__ == "__main__":
    run(main)
