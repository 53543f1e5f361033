"""Processes, meshes, memory, compilation and limits of the machine (floor 0)."""
