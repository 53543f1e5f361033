"""The training loop, its step, its stages and their settings."""
