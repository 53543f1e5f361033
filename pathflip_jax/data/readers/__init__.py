"""Feature files and slide files of other tools."""
