"""Run folders: settings, checkpoints and lock."""
