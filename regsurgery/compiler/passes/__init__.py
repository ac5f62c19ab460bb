"""Graph, sites -> graph: one file a pass."""
