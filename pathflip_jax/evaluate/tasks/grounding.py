"""Grounding: patch scores of concepts against annotated outlines, and lesion detection."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pathflip_jax.data.readers.outlines import of_concept, read_outlines
from pathflip_jax.evaluate.figures import BASE, GRID, INK, MAIN, SECOND, make_axes, set_title
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.evaluate.task import (
    GAIN,
    Headline,
    LoadedRun,
    Part,
    Predictions,
    Setting,
    Task,
    baseline_values,
    make_headline,
)
from pathflip_jax.evaluate.tasks import froc, map_scores
from pathflip_jax.evaluate.tasks.map_scores import MapScores
from pathflip_jax.evaluate.tasks.truth import Outlined, read_outlined
from pathflip_jax.evaluate.units import Evaluation, Units, group_rows
from pathflip_jax.grounding import heatmap, maps
from pathflip_jax.grounding.canvas import canvas_of
from pathflip_jax.grounding.methods import check_method
from pathflip_jax.grounding.surface import smooth_patches
from pathflip_jax.scores import statistics

KEY = "grounding"
EXAMPLES = {"good": 0.9, "typical": 0.5, "poor": 0.1}  # quantiles of the slides' AUC that the report shows
AXES = {"auc": "ROC AUC of patches", "pointing": "pointing game", "dice": "Dice, fixed threshold"}


class Maps(NamedTuple):
    """The scores of a run's maps, and of the attention of its Q-Former, which does not depend on the text."""

    maps: MapScores
    no_text: MapScores


def _check(spec: EvaluationSpec) -> None:
    if (spec.grounding is None) != (spec.outlines is None):
        raise ValueError("grounding needs both the texts of the concepts and the folder of their outlines; pass both")
    if spec.lesions is not None and spec.grounding is None:
        raise ValueError(
            f"lesions of {spec.lesions!r} are scored by grounding: pass the texts of the concepts and the outlines too"
        )


def _read(setting: Setting) -> Outlined:
    spec = setting.spec
    return read_outlined(
        setting.cohort, spec.grounding, spec.outlines, clear=spec.clear, lesions=spec.lesions, seed=spec.seed
    )


def _how(setting: Setting) -> dict:
    """The options of `Predictor.ground`."""
    return {"method": setting.spec.method, "window": setting.spec.window, "context": maps.CONTEXT}


def _predict(setting: Setting, outlined: Outlined, run: LoadedRun) -> Maps:
    concepts, predictor = outlined.concepts, run.predictor

    def score(map_of: Callable, name: str) -> MapScores:
        known = (outlined.truth, outlined.training, outlined.lesions, setting.spec.smooth)
        return map_scores.score_maps(map_of, setting.cohort.features, *known, name=name)

    found = score(lambda slide: map_scores.concept_scores(predictor, slide, concepts, **_how(setting)), run.name)
    no_text = score(lambda slide: np.tile(predictor.attend(slide), (len(concepts), 1)), f"{run.name}, no text")
    return Maps(found, no_text)


def _score(setting: Setting, outlined: Outlined, predictions: Predictions) -> Part:
    ours, predictor = predictions.ours, predictions.predictor
    by_colour = colour_maps(setting, outlined)
    found = score_grounding(setting, outlined, predictions, by_colour)
    found["how"] = _how(setting) | {
        "method": setting.spec.method or predictor.default_method,
        "smooth": setting.spec.smooth,
        "clear": setting.spec.clear,
    }
    pictures = {}
    if outlined.lesions is not None:
        found["froc"] = score_lesions(setting, outlined, predictions, by_colour)
        pictures["froc"] = froc_curves(
            {"this run": ours[0].maps, "attention, no text": ours[0].no_text, "mean colour": by_colour}
        )
    second = Path(predictions.compared_runs[0]).name if predictions.compared_runs else None
    pictures["concepts"] = concept_dots(found["per_concept"], second)
    for kind, slide_id in choose_examples(ours[0].maps.auc, list(outlined.truth)).items():
        pictures[f"grounding_{kind}"] = _panels(setting, outlined, predictor, slide_id)
    rows = grounding_rows(setting, outlined, predictions, by_colour)
    return Part(found, pictures, {"grounding": rows})


def colour_maps(setting: Setting, outlined: Outlined) -> MapScores | None:
    """The scores of the mean-colour map; None without slide files."""
    cohort, files, spec = setting.cohort, setting.cohort.slide_files, setting.spec
    if not set(outlined.truth) <= set(files) or not cohort.train:
        return None
    slides = cohort.train_features(spec.seed)
    colour_map = map_scores.ColourMap(slides, files, spec.outlines, list(outlined.concepts), spec.seed)
    training = {slide: known for slide, known in outlined.training.items() if slide in files}
    return map_scores.score_maps(
        colour_map, cohort.features, outlined.truth, training, outlined.lesions, spec.smooth, name="mean colour"
    )


def slide_means(values: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n"]:
    """The mean of each slide over its concepts, NaN for a slide with none."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def _weights(setting: Setting, outlined: Outlined) -> Float[np.ndarray, "W n"]:
    patient_of = setting.cohort.patient_of
    return statistics.patient_weights([patient_of[slide] for slide in outlined.truth], seed=setting.spec.seed)


def _baseline_maps(predictions: Predictions, by_colour: MapScores | None) -> dict[str, list[MapScores]]:
    """Baseline maps that do not depend on the text, by name, each over runs."""
    colour = {} if by_colour is None else {"mean_colour": [by_colour]}
    return {"no_text": [one.no_text for one in predictions.ours]} | colour


def score_grounding(
    setting: Setting, outlined: Outlined, predictions: Predictions, by_colour: MapScores | None
) -> dict:
    """AUC, pointing game and Dice over slides and by concept, with chance, text-free attention and mean colour."""
    weights = _weights(setting, outlined)
    ours, theirs = ([one.maps for one in side] for side in (predictions.ours, predictions.theirs))
    blind = _baseline_maps(predictions, by_colour)
    chance = map_scores.chance(outlined.truth)
    metrics = [name for name in map_scores.METRICS if np.isfinite(getattr(ours[0], name)).any()]

    def scored(of_slides, with_difference: bool) -> dict:
        """Every metric of one choice of values [n, C] -> [n]."""
        found = {}
        for metric in metrics:

            def over_runs(side, metric=metric):
                return [statistics.mean(of_slides(getattr(one, metric))) for one in side]

            by_chance = statistics.interval(over_runs([chance])[0], weights).value
            entry = statistics.over_runs(over_runs(ours), over_runs(theirs), weights, chance=by_chance)
            for name, side in blind.items():
                other = statistics.mean_over_runs(over_runs(side))
                entry[name] = statistics.interval(other, weights)._asdict()
                if with_difference:
                    gain = statistics.difference(statistics.mean_over_runs(over_runs(ours)), other)
                    entry.setdefault("gain", {})[name] = statistics.interval(gain, weights)._asdict()
            found[metric] = entry
        return found

    rows = []
    for c, concept in enumerate(outlined.concepts):
        row = {"concept": concept, "slides": int(np.isfinite(ours[0].auc[:, c]).sum())}
        row |= scored(lambda values, c=c: values[:, c], with_difference=False)
        rows.append(row | {"thresholds": [float(one.thresholds[c]) for one in ours]})
    return {
        "slides": int(np.isfinite(slide_means(ours[0].auc)).sum()),
        "threshold_slides": len(outlined.training),
        "texts": outlined.concepts,
        **scored(slide_means, with_difference=True),
        "per_concept": [row for row in rows if row["slides"]],
    }


def score_lesions(setting: Setting, outlined: Outlined, predictions: Predictions, by_colour: MapScores | None) -> dict:
    """The FROC score of CAMELYON16 and the sensitivity at each rate of false positives."""
    weights = _weights(setting, outlined)
    ours, theirs = ([one.maps for one in side] for side in (predictions.ours, predictions.theirs))
    blind = _baseline_maps(predictions, by_colour)

    def scored(rates) -> dict:
        def over_runs(side):
            return [froc.sensitivity(one.found, rates) for one in side]

        entry = statistics.over_runs(over_runs(ours), over_runs(theirs), weights)
        for name, side in blind.items():
            entry[name] = statistics.interval(statistics.mean_over_runs(over_runs(side)), weights)._asdict()
        return entry

    found = ours[0].found
    return {
        "concept": list(outlined.concepts)[outlined.lesions.concept],
        "slides": len(found),
        "slides_with_lesions": sum(len(one.lesions) > 0 for one in found),
        "lesions": sum(len(one.lesions) for one in found),
        "score": scored(froc.RATES),
        "at": {f"{rate:g}": scored([rate]) for rate in froc.RATES},
    }


def choose_examples(aucs: Float[np.ndarray, "n C"], slide_ids: list[str]) -> dict[str, str]:
    """Slides at the 90th, 50th and 10th percentile of AUC, each once."""
    means = slide_means(aucs)
    order = [i for i in np.argsort(means, kind="stable") if np.isfinite(means[i])]
    chosen: dict[str, str] = {}
    for kind, place in EXAMPLES.items():
        slide_id = slide_ids[order[round(place * (len(order) - 1))]]
        if slide_id not in chosen.values():  # a cohort of one or two slides
            chosen[kind] = slide_id
    return chosen


def _panels(setting: Setting, outlined: Outlined, predictor, slide_id: str) -> Figure:
    """The maps of the concepts present in a slide, with their annotated outlines."""
    spec, slide = setting.spec, setting.cohort.features(slide_id)
    inside, counts = outlined.truth[slide_id]
    raw = map_scores.concept_scores(predictor, slide, outlined.concepts, **_how(setting))
    found = smooth_patches(raw, slide.coords, slide.patch_size, spec.smooth)
    aucs = map_scores.concept_aucs(inside, found, counts)
    present = [c for c in np.argsort(-inside.sum(1), kind="stable") if np.isfinite(aucs[c])][:3]
    names = list(outlined.concepts)
    true = read_outlines(Path(spec.outlines) / f"{slide_id}.geojson")
    canvas = canvas_of(slide, setting.cohort.slide_files.get(slide_id))
    panels = [
        heatmap.Panel(
            f"“{outlined.concepts[names[c]][0]}”",
            raw[c],
            of_concept(true, names[c]),
            f"{names[c]}: ROC AUC {aucs[c]:.2f}",
        )
        for c in present
    ]
    return heatmap.draw_panels(
        canvas,
        panels,
        slide.coords,
        slide.patch_size,
        mpp=slide.mpp,
        heading=slide_id,
        reference=[polygon for panel in panels for polygon in panel.outline],
        smooth=spec.smooth,
    )


def grounding_rows(
    setting: Setting, outlined: Outlined, predictions: Predictions, by_colour: MapScores | None
) -> list[dict]:
    """One row per run, slide and concept present: the metrics of the run, of text-free attention and of mean colour."""
    patient_of = setting.cohort.patient_of
    rows = []
    for name, one in zip(predictions.runs, predictions.ours, strict=True):
        sources = {"": one.maps, "no_text_": one.no_text}
        if by_colour is not None:
            sources["mean_colour_"] = by_colour
        for i, (slide_id, (inside, counts)) in enumerate(outlined.truth.items()):
            for c, concept in enumerate(outlined.concepts):
                if np.isfinite(one.maps.auc[i, c]):
                    row = {"run": name, "slide_id": slide_id, "patient_id": patient_of[slide_id], "concept": concept}
                    row |= {"patches": int(counts.sum()), "inside": int((inside[c] & counts).sum())}
                    for source, found in sources.items():
                        values = {source + metric: getattr(found, metric)[i, c] for metric in map_scores.METRICS}
                        row |= {key: round(float(v), 6) if np.isfinite(v) else "" for key, v in values.items()}
                    rows.append(row)
    return rows


def concept_dots(rows: list[dict], second: str | None) -> Figure:
    """Each concept's AUC, pointing game and Dice with intervals, baselines and the compared run."""
    rows = sorted(rows, key=lambda row: np.nan_to_num(row["auc"]["value"]))
    metrics = [metric for metric in AXES if metric in rows[0]]
    figure, axes = make_axes(1.6 + 2.9 * len(metrics), 1.1 + 0.34 * len(rows), len(metrics))
    y = np.arange(len(rows))
    others = [("chance", "|", BASE, "chance"), ("no_text", "s", "#a8871c", "attention, no text")]
    others += [("mean_colour", "D", BASE, "mean colour"), ("compared", "o", SECOND, second)]
    for axis, metric in zip(axes, metrics, strict=True):
        entries = [row[metric] for row in rows]
        for key, marker, colour, label in others:
            if key in entries[0]:
                values = [entry[key] if key == "chance" else entry[key]["value"] for entry in entries]
                axis.scatter(values, y, marker=marker, s=26, color=colour, label=label, zorder=3)
        axis.hlines(
            y, [entry["low"] for entry in entries], [entry["high"] for entry in entries], color=MAIN, linewidth=2
        )
        axis.scatter([entry["value"] for entry in entries], y, s=38, color=MAIN, label="this run", zorder=4)
        axis.set_yticks(y, [row["concept"] for row in rows] if axis is axes[0] else [""] * len(rows))
        axis.set_xlim(right=1.02)
        axis.set_xlabel(AXES[metric])
        axis.grid(color=GRID, axis="x")
        axis.tick_params(axis="y", length=0, labelcolor=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, labelcolor=INK, loc="outside upper left", ncols=5)
    return figure


def froc_curves(found: Mapping[str, MapScores | None]) -> Figure:
    """Sensitivity over false positives per slide, by kind of map."""
    figure, (axis,) = make_axes(5.2, 3.4)
    for (name, one), colour in zip(found.items(), (MAIN, "#a8871c", BASE), strict=True):
        if one is not None:
            axis.step(*froc.curve(one.found), where="post", color=colour, linewidth=2, label=name)
    axis.set_xscale("symlog", base=2, linthresh=0.125)
    axis.set_xticks(froc.RATES)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(0, 16)
    axis.set_ylim(0, 1.02)
    axis.grid(color=GRID)
    axis.set_xlabel("false positives per slide")
    axis.set_ylabel("sensitivity")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    set_title(axis, "Lesion detection")
    return figure


def _headlines(found: dict) -> Iterator[Headline]:
    names = {"no_text": "no text", "mean_colour": "mean colour"}
    if entry := found[KEY].get("auc"):
        yield make_headline("Grounding: ROC AUC of patches", entry, baseline_values(entry, names))
        if "difference" in entry:
            name = f"Grounding: gain over {', '.join(found['compared_to'])}"
            yield make_headline(name, entry["difference"], kind=GAIN)
    if lesions := found[KEY].get("froc"):
        yield make_headline("Lesion detection: FROC score", lesions["score"], baseline_values(lesions["score"], names))


def _units(evaluation: Evaluation) -> Units:
    """The slides of an evaluation with the mean of each metric over their concepts."""
    runs = list(group_rows(evaluation.rows("grounding"), ("run",)).values())
    slides = [group_rows(sorted(run, key=lambda row: (row["slide_id"], row["concept"])), ("slide_id",)) for run in runs]
    first = slides[0].values()
    metrics = {}
    for metric in map_scores.METRICS:
        known = [[[row[metric] for row in rows if row[metric]] for rows in one.values()] for one in slides]
        if any(values for one in known for values in one):  # no Dice if no training slide has outlines
            means = [[np.mean(np.array(values, float)) if values else np.nan for values in one] for one in known]
            metrics[metric] = [statistics.mean(values) for values in means]
    concepts = ["+".join(row["concept"] for row in rows) for rows in first]
    return Units(list(slides[0]), [rows[0]["patient_id"] for rows in first], concepts, metrics)


TASK = Task(
    KEY,
    title="grounding",
    needs="grounding with outlines",
    wanted=lambda spec: spec.grounding is not None,
    check=_check,
    suits=lambda spec, predictor: check_method(predictor, spec.method),
    read=_read,
    predict=_predict,
    score=_score,
    headlines=_headlines,
    section=Path(__file__).with_name("grounding.html"),
    prominence=2,
    paired=lambda evaluation: {(KEY,): lambda: _units(evaluation)},
    metric_names={"auc": "ROC AUC of patches", "pointing": "Pointing game", "dice": "Dice"},
)
