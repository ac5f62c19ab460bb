"""How checkpoints are read; one file a library."""
