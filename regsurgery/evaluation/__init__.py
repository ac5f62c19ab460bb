"""Figures of the original and of the patched model, side by side."""
