"""Kinds of files that are not features, by their first bytes, for messages."""

_SLIDE = "pass the file of the features extracted from it, or run `pathflip prepare` on slides"
# First bytes, kind, and the cure, "" for that of all files.
_KINDS = (
    (b"PAR1", "a Parquet table", ""),
    (b"ARROW1", "an Arrow or Feather table", ""),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", _SLIDE),
    (b"\xff\xd8\xff", "a picture (JPEG)", _SLIDE),
    (b"II*\0", "a TIFF file, a slide or a mask", _SLIDE),
    (b"MM\0*", "a TIFF file, a slide or a mask", _SLIDE),
    (b"II+\0", "a BigTIFF file, a slide or a mask", _SLIDE),
    (b"MM\0+", "a BigTIFF file, a slide or a mask", _SLIDE),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (
        b"SQLite format 3\0",
        "an SQLite database, such as TIAToolbox's annotations",
        "pass the slide's feature file",
    ),
    (b"%PDF-", "a PDF document", "pass the slide's feature file"),
)
_SAFETENSORS = (b"{", 8)  # a header in JSON after its length


def describe_text(start: bytes) -> str:
    """Kind of a text file that is no table of features, by its first bytes; "" for any other file."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"{" or text[:2] in (b"[{", b"[\n", b"[]"):
        return "JSON, such as outlines (GeoJSON), texts or settings"
    return "XML, such as annotations of ImageScope or ASAP" if text[:1] == b"<" else ""


def describe_kind(start: bytes) -> tuple[str, str] | None:
    """Kind of a file and the cure, by its first bytes; None for an unknown one."""
    for magic, kind, cure in _KINDS:
        if start.startswith(magic):
            return kind, cure
    brace, place = _SAFETENSORS
    if start[place : place + 1] == brace and int.from_bytes(start[:place], "little") < 2**30:
        return "a safetensors file, usually the weights of a model", "pass the slide's feature file"
    return None
