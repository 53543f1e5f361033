"""Files on disks and at URLs, with atomic writes."""
