"""Readers of other tools' feature and slide files."""
