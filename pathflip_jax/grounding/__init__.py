"""Grounding of texts on slides: methods, boxes, figures, files."""
