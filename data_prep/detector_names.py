"""Names of the tissue detectors, for options and settings; importing them imports no detector."""

EMBEDDED = "embedded"  # the default
DETECTORS = (EMBEDDED, "otsu", "clam", "lazyslide")
