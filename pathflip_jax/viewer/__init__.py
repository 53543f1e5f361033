"""The page in a browser: a server for one user, and reports that stand alone."""
