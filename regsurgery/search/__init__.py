"""The search for register neurons."""
