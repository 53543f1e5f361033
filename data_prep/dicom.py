"""Names of the slides of DICOM series.

Archives name files by instance ("DCM_0.dcm", a UUID, only digits), so a slide's name is in the header or is the
folder's.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from pathflip_jax.data.pixels.dicom_headers import Header

# Uninformative names given by exporters and archives: counters, UIDs, UUIDs.
_UID = r"([a-z]{1,3}_)?\d+(\.\d+){2,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}"
_COUNTER = r"(dcm|im|img|image|i|level|series|instance|sm)[-_]?\d{1,8}([-_]\d{1,4})*"
_INSTANCE = re.compile(f"{_COUNTER}|{_UID}", re.IGNORECASE)
_NO_NAME = re.compile(f"{_UID}|dicom|dcm|series", re.IGNORECASE)
_NUMBER = re.compile(r"\d+([-_]\d+)*")  # a counter of the files of one series, but a slide's name among others


def name_series(headers: Mapping[Path, Header]) -> dict[Path, str]:
    """Map from one file of each series to the slide id of the series; OpenSlide opens a series by any of its files.

    A file that is its whole series and has an informative name gives the id. Otherwise the folder names the slide where
    it holds one series and its name is not a UID; else the container does (the identifier on the glass), and the UID of
    the series where two series share a container or it is empty.
    """
    groups: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path, header in sorted(headers.items()):
        groups[path.parent, header.series or path.name].append(path)
    in_folder = Counter(folder for folder, _ in groups)
    series_per_container = Counter(
        container for _, container in {(key[1], headers[own[0]].container) for key, own in groups.items()}
    )
    names = {}
    for (folder, series), (first, *others) in groups.items():
        named = (folder.name or folder.resolve().name) if in_folder[folder] == 1 else ""
        stem = _stem(first)
        own = "" if others or _INSTANCE.fullmatch(stem) or (named and _NUMBER.fullmatch(stem)) else stem
        container = re.sub(r"[/\\:\x00-\x1f]+", "_", headers[first].container).lstrip(".")
        container = container if series_per_container[headers[first].container] == 1 else ""
        informative = "" if _NO_NAME.fullmatch(named) else named
        names[first] = own or informative or container or named or series
    return names


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in (".dcm", ".dicom", ".ima") else path.name
