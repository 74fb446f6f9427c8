#!/usr/bin/env python
"""The command ``raftmlp benchmark`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.benchmark import main

if __name__ == "__main__":
    run(main)
