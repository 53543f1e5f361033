"""Experiment records: one ml_collections file per run that is worth repeating."""
