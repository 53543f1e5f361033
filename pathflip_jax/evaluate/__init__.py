"""Scores of a run on a cohort, with intervals and baselines, and the report of them."""
