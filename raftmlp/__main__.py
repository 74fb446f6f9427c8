"""``python -m raftmlp`` is the console command."""

from .cli.launcher import main

main()
