"""The contents of a patched folder."""
