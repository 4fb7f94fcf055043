"""`python -m rayward.cli`."""

from rayward.cli import main

main()
