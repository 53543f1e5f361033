"""Losses of both model families, as pure functions of arrays."""
