"""Metrics, telemetry, goodput and profiles of a run."""
