"""``python -m raftmlp`` is the console command."""

from .commands.main import main

main()
