"""Files on disks and behind URLs, written whole."""
