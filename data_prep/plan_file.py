"""`plan.json`: the settings that a folder of records was started with, and the shard of each of its slides."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_files import write_json

PARTS = ".parts"  # hidden: shards are found by their suffix
# Settings for values missing from slide files, by command, and the record field that they fill. A folder is
# not tied to their values: slides of two scanners need two.
FILLS = {
    "prepare": {"assume_mpp": "mpp"},
    "import": {"mpp": "mpp", "patch_size": "patch_size", "encoder": "encoder"},
}
OVERRIDE = "override_mpp"  # nor to this one, for slides whose files are wrong
_LATER = {"dtype": "float16"}  # settings missing from folders of earlier versions


@dataclass(frozen=True)
class Entry:
    """Plan entry of a slide: its shard, its case and mpp from the slide table, and its filled-in values."""

    shard: int
    case: str = ""
    mpp: float | None = None
    given: dict[str, Any] = field(default_factory=dict)


def fills(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that apply to single slides and are set."""
    names = [*FILLS.get(settings.get("command", ""), {}), OVERRIDE]
    return {name: settings[name] for name in names if settings.get(name) is not None}


def has_records(out: Place) -> bool:
    """Whether a folder holds shards or finished slides."""
    return any(out.glob("*.tfrecord*")) or any(out.glob(f"{PARTS}/*.tfrecord"))


def read_plan(out: Place, settings: dict[str, Any]) -> dict[str, Entry]:
    """Read the plan entries of the slides of a folder; none for a new folder.

    Raises ValueError for a folder that was started with other settings, or not by these commands.
    """
    path = out / "plan.json"
    if not has_records(out):
        return {}
    if not path.exists():
        raise ValueError(
            f"{out} holds records without a plan.json, so they were not written by this command; choose another --out"
        )
    try:
        found = json.loads(path.read_bytes())
        before = found["settings"]
        if "slides" in found:
            entries = {slide: Entry(**entry) for slide, entry in found["slides"].items()}
        else:
            entries = _first_format(found["cases"], before)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a plan of records ({error!r}); choose another --out") from None
    before, own = _LATER | before, fills(before).keys() | fills(settings).keys()
    changed = [
        f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*before, *settings} - own)
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"{out} was started with other settings: {'; '.join(changed)}. Pass the same settings, or choose "
            "another --out"
        )
    return entries


def _first_format(cases: dict[str, str], settings: dict[str, Any]) -> dict[str, Entry]:
    """Entries of the first plan format, in which a slide's order alone determined its shard."""
    size, given = settings["slides_per_shard"], fills(settings)
    return {slide: Entry(i // size, cases[slide], None, given) for i, slide in enumerate(sorted(cases))}


def write_plan(out: Place, settings: dict[str, Any], entries: Mapping[str, Entry], slides: Collection[str]) -> None:
    """Write the settings, and the entries of these slides."""
    kept = {slide: asdict(entry) for slide, entry in sorted(entries.items()) if slide in slides}
    write_json(out / "plan.json", {"settings": settings, "slides": kept}, indent=1)
