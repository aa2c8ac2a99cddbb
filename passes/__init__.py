"""Graph to graph: the rewrites, and the few things all of them share."""
