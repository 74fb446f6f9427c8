#!/usr/bin/env python
"""The command `raftmlp eval-mm` as a script."""

import sys

if __name__ == "__main__":
    sys.argv[:1] = ["raftmlp", "eval-mm"]
    from raftmlp.cli.launcher import main

    main()
