"""Encoder, width and patch size of a cohort: those of its shards, else of most slides, the same for all tasks."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.jobs import Job
from data_prep.plan import Plan
from data_prep.shards import part_traits
from pathflip_jax.data.records.cohort import Cohort, Traits, majority_cohort, traits_of
from pathflip_jax.data.records.index import read_index
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.storage.json_values import json_object


class MajorityVote:
    """Vote of the slides of one run, or of one task of it.

    Slides from `prepare` share their traits by the settings: the first represents all, and shards can be written
    immediately. Feature files do not, so no shard of a new cohort is written before all have voted. The tasks of a job
    array do not see each other's slides: the first with a majority stores its votes for the others.
    """

    def __init__(self, plan: Plan) -> None:
        self.cohort: Cohort | None = plan.cohort
        self._plan: Plan = plan
        self._voters: list[Traits] = []

    def add(self, jobs: Iterable[Job]) -> None:
        """Count the votes of finished slides."""
        if self.cohort is None:
            self._voters += filter(None, map(part_traits, jobs))

    def is_over(self, outstanding: int) -> bool:
        """Whether the majority is certain with this many slides unfinished; `cohort` then holds it.

        Raises NoMajorityError when all are finished without a majority.
        """
        if self.cohort is not None or (not outstanding and not self._voters):
            return True
        alike = has_uniform_traits(self._plan)
        if outstanding and not (alike and self._voters):
            return False
        self.cohort = vote(self._voters, alike) if alike or self._plan.task[1] == 1 else self._shared()
        return True

    def _shared(self) -> Cohort:
        """Cohort that the tasks of a job array agree on: of existing shards, else of the first task to decide."""
        written = [info for path in self._plan.shards if path.exists() for info in read_index(path).slides]
        if written:
            return majority_cohort([traits_of(info) for info in written])
        path, own = _votes(self._plan), _votes(self._plan, self._plan.task[0])
        if not path.exists():
            vote(self._voters, False)  # raises NoMajorityError, so that such a task decides nothing
            write_json(own, {"slides": self._voters}, indent=1)
            with contextlib.suppress(FileExistsError):
                os.link(own, path) if isinstance(own, Path) else write_json(path, {"slides": self._voters}, indent=1)
            own.unlink()
        return vote([Traits(*row) for row in json_object(path, path.read_bytes())["slides"]], False)

    @staticmethod
    def forget(plan: Plan) -> None:
        """Delete the votes: the shards of a complete folder define its cohort."""
        _votes(plan).unlink(missing_ok=True)


def has_uniform_traits(plan: Plan) -> bool:
    """Whether the settings give all slides of a plan the same traits."""
    return plan.settings.get("command") == "prepare"


def vote(voters: list[Traits], alike: bool) -> Cohort:
    """Common traits of the slides of a run: the first by name represents all where they are `alike`."""
    return majority_cohort(sorted(voters)[: 1 if alike else None])


def _votes(plan: Plan, task: int | None = None) -> Place:
    return plan.parts / ("votes.json" if task is None else f"votes-{task:05d}.json")
