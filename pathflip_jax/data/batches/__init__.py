"""Training batches as a function of seed and step."""
