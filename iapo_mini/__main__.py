"""``python -m iapo_mini`` is the command line."""

from iapo_mini.cli import main

main()
