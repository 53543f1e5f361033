"""Weights and files of others, and of other versions, as flat dicts of parameters and settings of today."""
