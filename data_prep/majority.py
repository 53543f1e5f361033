"""The encoder, width and patch size of a cohort: those of its shards, else of most slides, the same for all tasks."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.jobs import Job
from data_prep.plan import Plan
from data_prep.plan_file import write_json
from data_prep.shards import part_traits
from pathflip_jax.data.records.cohort import Cohort, Traits, elect, traits_of
from pathflip_jax.data.records.index import read_index
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_values import json_object


class Election:
    """The vote of the slides of one run, or of one task of it.

    Slides that `prepare` makes are alike by their settings: the first speaks for all, and shards can be written as they
    come. Feature files are not, so no shard of a new cohort is written before all have voted. The tasks of a job array
    do not see each other's slides: the first that is decided leaves its votes for the others.
    """

    def __init__(self, plan: Plan) -> None:
        self.cohort: Cohort | None = plan.cohort
        self._plan: Plan = plan
        self._voters: list[Traits] = []

    def add(self, jobs: Iterable[Job]) -> None:
        """Let the slides that are through vote."""
        if self.cohort is None:
            self._voters += filter(None, map(part_traits, jobs))

    def is_over(self, outstanding: int) -> bool:
        """Whether it is known what the cohort is, while so many slides are not through; `cohort` is it then.

        Raises Undecided when all are through and there is no majority.
        """
        if self.cohort is not None or (not outstanding and not self._voters):
            return True
        alike = is_alike(self._plan)
        if outstanding and not (alike and self._voters):
            return False
        self.cohort = vote(self._voters, alike) if alike or self._plan.task[1] == 1 else self._shared()
        return True

    def _shared(self) -> Cohort:
        """The cohort that the tasks of a job array agree on: of shards that stand, else of the first to decide."""
        standing = [info for path in self._plan.shards if path.exists() for info in read_index(path).slides]
        if standing:
            return elect([traits_of(info) for info in standing])
        path, own = _votes(self._plan), _votes(self._plan, self._plan.task[0])
        if not path.exists():
            vote(self._voters, False)  # one without a majority decides nothing
            write_json(own, {"slides": self._voters})
            with contextlib.suppress(FileExistsError):
                os.link(own, path) if isinstance(own, Path) else write_json(path, {"slides": self._voters})
            own.unlink()
        return vote([Traits(*row) for row in json_object(path, path.read_bytes())["slides"]], False)

    @staticmethod
    def forget(plan: Plan) -> None:
        """Take the votes away: the shards of a whole folder say what it is."""
        _votes(plan).unlink(missing_ok=True)


def is_alike(plan: Plan) -> bool:
    """Whether the settings make all slides of a plan alike."""
    return plan.settings.get("command") == "prepare"


def vote(voters: list[Traits], alike: bool) -> Cohort:
    """The common traits of the slides of a run: the first by name speaks for all where they are `alike`."""
    return elect(sorted(voters)[: 1 if alike else None])


def _votes(plan: Plan, task: int | None = None) -> Place:
    return plan.parts / ("votes.json" if task is None else f"votes-{task:05d}.json")
