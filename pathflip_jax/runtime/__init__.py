"""Processes, meshes, memory, compilation and limits of the machine."""
