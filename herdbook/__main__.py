"""`python -m herdbook` is `herd`: what torchrun starts, which takes a module and not a command."""

from herdbook.cli import main

main()
