#!/usr/bin/env python
"""The command ``raftmlp convert`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.convert import main

if __name__ == "__main__":
    run(main)
