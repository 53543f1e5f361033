"""Saving a model as a run folder, and loading a run folder as model, settings and tokenizer."""

from pathlib import Path

import jax
from etils import epath
from jax.sharding import SingleDeviceSharding

from pathflip_jax.convert.versions import git_revision
from pathflip_jax.model.parameters import abstract_params, flatten, unflatten
from pathflip_jax.runs.checkpoints import Checkpoints, NewerOrbaxError, restore_arrays, saved_steps
from pathflip_jax.runs.files import (
    BEST,
    CHECKPOINTS,
    MODEL,
    TOKENIZER,
    describe_run,
    read_model_config,
    read_run_config,
    run_folder,
)


def save_run(workdir: str | Path, model, config: dict, tokenizer) -> None:
    """Save a model that was trained elsewhere as a run folder, for `load_run` and for training from it.

    `config` is the content of config.json; the settings that a later evaluation reads are in its section "data".
    Raises FileExistsError when the folder already holds a run.
    """
    workdir = run_folder(workdir)
    if (workdir / MODEL).exists():
        raise FileExistsError(f"{workdir}: already contains a run; write to another folder")
    describe_run(workdir, model.config, config, tokenizer)
    with Checkpoints(workdir, keep=2, facts={"git": git_revision(), "config": config}) as checkpoints:
        checkpoints.save_best(0, flatten(model), {})
    epath.Path(workdir / CHECKPOINTS).rmtree()


def load_run(workdir: str | Path, which: str | int = "best"):
    """(model, config, tokenizer) of a run folder; `which` is "best" (by validation), "latest" or a step.

    Follows `train.checkpoints` of its config if the folder has no checkpoints. A run without validation has no best
    checkpoint, so its latest is used. Raises FileNotFoundError when the folder lacks a run or the requested checkpoint,
    ValueError when it is damaged.
    """
    from pathflip_jax.data.texts.tokenizer import TextTokenizer

    workdir = run_folder(workdir)
    settings = read_run_config(workdir)
    if "lm" in settings:
        raise ValueError(
            f"{workdir}: a run of the language stage, for `pathflip caption` and `pathflip ask`; expected an alignment "
            f"run, such as the one that embeds its slides, {settings['lm'].get('aligner')}"
        )
    config, tokenizer = read_model_config(workdir / MODEL), TextTokenizer(workdir / TOKENIZER)
    return unflatten(config, read_params(workdir, settings, abstract_params(config), which)), settings, tokenizer


def read_params(
    workdir: Path, settings: dict, shapes: dict[str, jax.ShapeDtypeStruct], which: str | int = "best"
) -> dict[str, jax.Array]:
    """Parameters of a run's checkpoint, of these names and shapes, on one device; raises as `load_run`."""
    elsewhere = settings.get("train", {}).get("checkpoints")
    if elsewhere and not (saved_steps(workdir / CHECKPOINTS) or saved_steps(workdir / BEST)):
        workdir = run_folder(elsewhere)
    folder, step = _find(workdir, which)
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for name, leaf in shapes.items()}
    try:
        return restore_arrays(folder / str(step), {"params": abstract})[0]["params"]
    except NewerOrbaxError:
        raise
    except Exception as error:  # Orbax raises bare Exception for damaged files
        raise ValueError(
            f"{folder / str(step)}: damaged ({str(error).splitlines()[0]}); choose another step among "
            f"{sorted({*saved_steps(workdir / CHECKPOINTS), *saved_steps(workdir / BEST)})}"
        ) from error


def _find(workdir: Path, which: str | int) -> tuple[Path, int]:
    """Folder and step of the requested checkpoint."""
    best, latest = saved_steps(workdir / BEST), saved_steps(workdir / CHECKPOINTS)
    if which == "best" and best:
        return workdir / BEST, best[-1]
    if which in ("best", "latest") and latest:
        return workdir / CHECKPOINTS, latest[-1]
    if which == "latest" and best:
        return workdir / BEST, best[-1]
    for folder, steps in ((CHECKPOINTS, latest), (BEST, best)):
        if which in steps:
            return workdir / folder, int(which)
    there = sorted({*best, *latest})
    raise FileNotFoundError(
        f"{workdir}: no checkpoint {which!r}; " + (f"there are steps {there}" if there else "none was saved yet")
    )
