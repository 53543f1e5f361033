"""Training loop, step, stages and their settings."""
