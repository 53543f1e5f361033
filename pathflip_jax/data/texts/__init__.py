"""Reports, tables, questions and tokenisation."""
