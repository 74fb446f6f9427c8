#!/usr/bin/env python
"""The command `raftmlp train` as a script."""

import sys

if __name__ == "__main__":
    sys.argv[:1] = ["raftmlp", "train"]
    from raftmlp.cli.launcher import main

    main()
