"""Outcome of a run over many slides, as text and as files."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from data_prep.device_usage import DeviceUsage
from data_prep.jobs import StageTimings
from pathflip_jax.data.storage.failures import Failure, list_failures, preview
from pathflip_jax.data.storage.files import Place


@dataclass(frozen=True)
class Report:
    """Outcome of a run: slides `done` now, `skipped` because they have a record, `failed`; `finished` when the
    folder is complete (of a job array, when its last task has ended); `timings`, the cost of the slides. `absent` are
    rows of the slide table without a file; `device`, the use of the devices by an encoder that runs on them."""

    folder: Place
    done: list[str]
    skipped: list[str]
    failed: list[Failure]
    finished: bool
    notes: list[str] = field(default_factory=list)
    timings: StageTimings = StageTimings()
    absent: list[Failure] = field(default_factory=list)
    device: DeviceUsage | None = None

    def summary(self) -> str:
        """Final summary for the user, failures by name."""
        counts = f"slides written {len(self.done)}, already there {len(self.skipped)}, failed {len(self.failed)}"
        lines = [f"{self.folder}: {counts}", *self.notes]
        if not self.finished and not self.failed:
            lines.append("other tasks of the job array still have shards to write; the last one completes the folder")
        if self.timings.patches:
            lines.append(self.timings.summary())
        if self.device is not None and self.device.encoded:
            lines.append(self.device.summary())
        if self.failed:
            lines.append("not in the records (failures.json in that folder lists all):")
            lines += list_failures(self.failed)
        return "\n".join(lines)


def grouped(notes: Iterable[tuple[str, str]]) -> list[str]:
    """One line per note, with the number of its slides and some of their names."""
    slides: dict[str, set[str]] = {}
    for note, slide in notes:
        slides.setdefault(note, set()).add(slide)
    lines = [f"{note}: {_count(own)} ({preview(sorted(own))})" for note, own in sorted(slides.items())]
    if any("mpp" in note and "not used" in note for note in slides):
        lines.append("to replace the mpp that files state, pass --override-mpp, or fill in the column mpp of --slides")
    return lines


def _count(slides: set[str]) -> str:
    return f"{len(slides)} slide{'s' if len(slides) > 1 else ''}"
