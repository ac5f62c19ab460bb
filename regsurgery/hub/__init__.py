"""Patched folders to the Hugging Face Hub."""
