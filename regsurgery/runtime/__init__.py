"""What is copied into patched folders. Imports nothing of the project."""
