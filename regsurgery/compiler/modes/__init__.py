"""The modes that are fitted on images."""
