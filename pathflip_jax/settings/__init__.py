"""The settings of a run as frozen dataclasses: each with its default, its bounds and what it is for."""
