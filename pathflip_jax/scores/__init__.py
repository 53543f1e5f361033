"""Metrics and statistics of predictions, computed from arrays and texts alone."""
