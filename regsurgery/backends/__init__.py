"""How patched checkpoints are written; one file per format."""
