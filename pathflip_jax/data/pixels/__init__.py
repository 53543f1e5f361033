"""Pixels of slide files: the readers, and the table that picks one by the content of a file."""
