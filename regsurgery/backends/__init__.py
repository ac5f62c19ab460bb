"""How patched checkpoints are written; one file a format."""
