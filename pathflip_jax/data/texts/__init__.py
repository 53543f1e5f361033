"""Reports, tables, questions and tokens."""
