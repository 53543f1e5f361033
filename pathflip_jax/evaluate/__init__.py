"""Aggregate predictions into metrics, intervals and paired comparisons, and report them."""
