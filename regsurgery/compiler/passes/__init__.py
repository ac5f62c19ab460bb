"""Graph, sites -> graph: one file per pass."""
