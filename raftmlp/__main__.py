"""``python -m raftmlp`` is the console command."""

from raftmlp_cli import main

main()
