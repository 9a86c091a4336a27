"""`python -m grafting` is `graft`."""

from grafting.cli import main

main()
