#!/usr/bin/env python
"""The command ``raftmlp benchmark`` as a script."""

from raftmlp.commands.benchmark import main
from raftmlp.commands.console import run

if __name__ == "__main__":
    run(main)
