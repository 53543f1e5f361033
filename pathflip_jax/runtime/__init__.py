"""Processes, meshes, memory, compilation and machine limits."""
