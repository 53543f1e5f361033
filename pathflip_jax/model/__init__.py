"""The two networks, their layers and their configs."""
