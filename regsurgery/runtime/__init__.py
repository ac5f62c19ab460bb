"""What is copied into patched folders. Imports nothing from the project."""
