"""A patched folder against its original."""
