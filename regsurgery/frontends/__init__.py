"""How checkpoints are read; one file per library."""
