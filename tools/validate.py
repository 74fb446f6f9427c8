#!/usr/bin/env python
"""The command `raftmlp validate` as a script."""

import sys

if __name__ == "__main__":
    sys.argv[:1] = ["raftmlp", "validate"]
    from raftmlp.cli.launcher import main

    main()
