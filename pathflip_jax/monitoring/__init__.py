"""Metrics, telemetry, goodput and profiling of a run."""
