"""Table of tasks, in the order in which they are read, scored and summarised: one file and one entry each."""

from pathflip_jax.evaluate.tasks import few_shot, grounding, language, regions, retrieval, zero_shot

TASKS = (retrieval.TASK, regions.TASK, zero_shot.TASK, grounding.TASK, few_shot.TASK, language.TASK)
