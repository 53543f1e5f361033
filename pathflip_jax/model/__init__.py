"""The alignment networks, their layers and their configs."""
