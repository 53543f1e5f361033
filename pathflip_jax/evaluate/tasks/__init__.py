"""Table of tasks, in the order in which they are read, scored and summarised: one file and one entry each."""

from importlib import import_module

from pathflip_jax.evaluate.task import Task

FILES = (
    "retrieval",
    "regions",
    "zero_shot",
    "zero_shot_windows",
    "grounding",
    "few_shot",
    "survival",
    "regression",
    "language",
)
TASKS: tuple[Task, ...] = tuple(import_module(f"{__name__}.{file}").TASK for file in FILES)
