"""Run folders: settings, checkpoints and their lock."""
