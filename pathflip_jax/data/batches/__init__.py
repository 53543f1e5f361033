"""Batches as a function of seed and step."""
