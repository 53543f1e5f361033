"""The losses of both families, of arrays alone."""
