#!/usr/bin/env python
"""The command `raftmlp train-mm` as a script."""

import sys

if __name__ == "__main__":
    sys.argv[:1] = ["raftmlp", "train-mm"]
    from raftmlp.cli.launcher import main

    main()
