"""Browser viewer: a server for one user, and self-contained reports."""
