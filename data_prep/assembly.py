"""Assembly of a plan's shards on this machine, in order, as the last slide of each ends."""

from collections import deque

from data_prep.jobs import Job, Outcome
from data_prep.majority import MajorityVote
from data_prep.plan import Plan
from data_prep.shards import Progress, assemble


class Assembly:
    """Shards of a plan whose slides end one after the other; `jobs` are those without a part from an earlier run.

    No shard is assembled before the majority of the slides is certain.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.progress = plan, Progress()
        self._left = {
            path: {job.slide_id for job in own if not job.part.exists()} for path, own in plan.missing.items()
        }
        self.jobs = [job for job in plan.jobs if job.slide_id in self._left[job.shard]]
        self._majority = MajorityVote(plan)
        self._majority.add(job for job in plan.jobs if job.slide_id not in self._left[job.shard])
        self._shards = deque(self._left)
        self._assemble_finished()

    def take(self, job: Job, outcome: Outcome, strict: bool) -> None:
        """Count the end of a slide, and assemble what is complete; `strict` assembles nothing after a bad slide."""
        self.progress.count(job, outcome)
        self._left[job.shard].remove(job.slide_id)
        if not (outcome.error and strict):
            self._majority.add([job])
            self._assemble_finished()

    def _assemble_finished(self) -> None:
        if not self._majority.is_over(outstanding=sum(map(len, self._left.values()))):
            return
        while self._shards and not self._left[self._shards[0]]:
            self.progress.add(assemble(self.plan.missing[self._shards.popleft()], self._majority.cohort))
