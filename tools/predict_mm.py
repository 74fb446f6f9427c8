#!/usr/bin/env python
"""The command ``raftmlp predict-mm`` as a script."""

from raftmlp.commands.console import run
from raftmlp.commands.predict_mm import main

if __name__ == "__main__":
    run(main)
