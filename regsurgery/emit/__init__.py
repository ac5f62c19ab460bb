"""What stands in a patched folder."""
