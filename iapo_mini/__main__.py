"""Run the command line with ``python -m iapo_mini``."""

from iapo_mini.cli import main

main()
