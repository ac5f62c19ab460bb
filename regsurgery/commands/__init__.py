"""The commands, each a straight line."""
