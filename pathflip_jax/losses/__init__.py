"""The losses of both families, of arrays alone (floor 0)."""
