"""Scores and statistics of predictions, of arrays and texts alone."""
