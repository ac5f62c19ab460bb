"""Hostile and broken input, at random and by number: `python -m tests.fuzz --inputs 20000 --seed 0`."""
