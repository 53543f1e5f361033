"""Zero-shot classification by windows: the class probabilities of a slide are the mean of those of its patches.

Each patch is classified with its window, as by the grounding method "slide": the class of the largest area wins. A
slide's own embedding tells which findings it shows, but hardly which of them is the largest. After MI-Zero (Lu et al.,
CVPR 2023), which pools the scores of patches without windows.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.task import LoadedRun, Part, Predictions, Setting, Task
from pathflip_jax.evaluate.tasks import zero_shot
from pathflip_jax.evaluate.tasks.zero_shot import Classes
from pathflip_jax.evaluate.units import Evaluation, classified_units
from pathflip_jax.grounding.methods import check_method, prepare

KEY = "zero_shot_windows"
CONFUSION, PREDICTIONS = "confusion_windows", "predictions_windows"
METHOD = "slide"  # of grounding, which embeds each window as a slide


def _check(spec: EvaluationSpec) -> None:
    if spec.zero_shot_windows and spec.prompts is None:
        raise ValueError("zero-shot classification by windows needs the texts of each class: pass the prompts too")


def window_probabilities(predictor, slide, classes: Float[np.ndarray, "C D"], window: int) -> Float[np.ndarray, "C"]:
    """The mean over a slide's patches of the class probabilities of each patch's window."""
    windows = prepare(predictor, slide, method=METHOD, window=window).state
    return zero_shot.class_probabilities(windows, classes).mean(0)


def _predict(setting: Setting, classes: Classes, run: LoadedRun) -> Float[np.ndarray, "n C"]:
    embedded = zero_shot.class_embeddings(run.predictor.encode_text, classes.prompts.classes)
    bar = tqdm(classes.cohort.slide_ids, desc=f"{run.name}: classes of windows", unit="slide", leave=False)
    features, window = setting.cohort.features, setting.spec.window
    return np.stack([window_probabilities(run.predictor, features(slide), embedded, window) for slide in bar])


def _score(setting: Setting, classes: Classes, predictions: Predictions) -> Part:
    part = zero_shot.score_part(setting, classes, predictions, CONFUSION, PREDICTIONS)
    return part._replace(scores=part.scores | {"window": setting.spec.window})


def _paired(evaluation: Evaluation) -> dict:
    return {(KEY, evaluation.scores[KEY]["task"]): lambda: classified_units(evaluation, PREDICTIONS, {})}


TASK = Task(
    KEY,
    title="zero-shot by windows",
    needs="prompts and zero_shot_windows",
    wanted=lambda spec: spec.zero_shot_windows,
    check=_check,
    suits=lambda spec, predictor: check_method(predictor, METHOD),
    read=zero_shot.read_classes,
    predict=_predict,
    score=_score,
    headlines=lambda found: zero_shot.make_headlines(found[KEY], "Zero-shot by windows"),
    section=Path(__file__).with_name("zero_shot_windows.html"),
    prominence=1,
    paired=_paired,
)
