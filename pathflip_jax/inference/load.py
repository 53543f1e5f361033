"""Runs, exports and released checkpoints as a `Predictor`; slides from feature files and records."""

import logging

from pathflip_jax.convert.exported import ALIGNER, LANGUAGE
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.storage.files import as_path
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.inference.sources import choose, choose_one, find_sources
from pathflip_jax.runs.files import MODEL
from pathflip_jax.runs.places import find_run

log = logging.getLogger(__name__)
WEIGHTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


def load(path, which: str | int = "best", *, bert=None, arguments=None, weights: str = "") -> Predictor:
    """Load a run folder (trained here, or made by `pathflip convert`), local or on gs://, for inference.

    The name of a run that comes with the package loads that one (`runs/bundled.py`); `hf://OWNER/NAME@REVISION` one
    from the Hugging Face hub, as `pathflip push` writes it.
    `which` is "best" (by validation), "latest" or a step. The folder of an export, or its weights, load as the original
    run. Any other file is a checkpoint of the released PyTorch model, and `bert` the folder of the BERT that it was
    trained with; `arguments` are those of the published run, where the file does not hold them; `weights` names one of
    several sets of weights in it. Settings that no file states are assumed to be the released code's defaults, and
    logged.
    """
    name, path = str(path), find_run(path)
    if as_path(path).suffix in WEIGHTS or _is_export(path):
        from pathflip_jax.convert.released import load_released

        found = load_released(path, bert, arguments=arguments, weights=weights)
        for note in found.notes:
            log.warning("%s: %s", path, note)
        model, config, tokenizer = found.model, found.settings, found.tokenizer
    else:
        from pathflip_jax.runs.folder import load_run  # with Orbax, which takes 0.3 s: exports need none

        if not is_url(path) and (as_path(path) / LANGUAGE).exists():
            raise ValueError(
                f"{name}: an export of a language run, for `pathflip caption` and `pathflip ask`; expected an "
                f"alignment run, such as the one that embeds its slides, in its folder {ALIGNER}/"
            )
        model, config, tokenizer = load_run(path, which=which)
        if bert is not None or arguments or weights:
            raise ValueError(f"{path}: a run has its own tokenizer and settings; leave out bert, arguments and weights")
    predictor = Predictor(model, config, tokenizer, name=name)
    if predictor.assumed:
        log.warning("%s: assumed, because no file states it: %s", path, "; ".join(predictor.assumed))
    return predictor


def _is_export(path) -> bool:
    from pathflip_jax.convert.exported import read_exported

    return not is_url(path) and not (as_path(path) / MODEL).exists() and read_exported(path) is not None


def read_slide(path, slide_id: str | None = None, **known) -> SlideFeatures:
    """Read one slide's features: a feature file of any format (`data/readers/formats.py`), or a slide of records.

    Records may be at a URL, feature files only on a local disk. `slide_id` chooses from a folder that holds several
    slides, and names the slide of a feature file. `known` gives what a feature file may not state: patch_size (level-0
    pixels), mpp, encoder, as `read_features` takes it. A slide file is refused: `Predictor.read` encodes it.
    """
    found = find_sources(path, known, slide_id or "")
    source = choose_one(choose(found, [slide_id] if slide_id else None, path), path)
    if source.features is None:
        raise ValueError(
            f"{source.image}: a slide, not its features, which depend on the run: read it by the run, as in "
            f'`pathflip_jax.load(RUN).read("{source.image}")`, or run `pathflip prepare` on it and pass the records'
        )
    return source.features()
