"""Maps of texts on slides: methods, boxes, drawings, files."""
