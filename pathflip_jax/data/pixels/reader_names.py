"""Names of the readers of slides, for options and settings; importing them imports no reader."""

READERS = ("openslide", "tifffile", "wsidicom")  # the first one is the default
