"""Checkpoint files: headers, bytes, checksums, downloads."""
