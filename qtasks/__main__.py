"""`python -m qtasks` is the command `qtasks`."""

from qtasks.cli import main

main()
