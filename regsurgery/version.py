"""The version, where everything that stamps it finds it."""

__version__ = "0.1.0"
