"""Run settings as frozen dataclasses, each field with its default, bounds and help text."""
