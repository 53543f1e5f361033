"""Run folders: settings, checkpoints and their lock (floor 4)."""
