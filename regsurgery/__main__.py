"""`python -m regsurgery`, and so `torchrun -m regsurgery find ...`."""

from regsurgery.cli import main

main()
