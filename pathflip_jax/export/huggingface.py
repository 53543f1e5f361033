"""Export of trained models for transformers: a folder for `AutoModel.from_pretrained`, with a model card.

Users with this package import `pathflip_jax.convert.torch_model` (`torch_pathflip2` for a PathFLIP2) and need no remote
code; for all others the folder includes the same file, which `trust_remote_code=True` loads.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from pathflip_jax.convert.exported import REGION_TOP_K, describe_export
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe, patch_words
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.storage.json_values import json_object
from pathflip_jax.export.families import export_of
from pathflip_jax.export.pytorch import copy_code, merged_state, write_checkpoint
from pathflip_jax.export.readmes import caption_length
from pathflip_jax.inference.load import load
from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.families import family_of
from pathflip_jax.vision.recipes import find_recipe

CARD = "model_card.md"
# Entries of scores.json that name folders of this machine, or belong to the language stage, which is exported apart.
LEFT_OUT = ("runs", "compared_to", "command", "language")
# Licences of encoders that are not in `vision/recipes.py`. A licence may apply to models that are trained on features.
ENCODER_LICENCES = {
    "stain_texture": "Apache-2.0 (part of pathflip_jax; a baseline, not a foundation model)",
    "ctranspath": "GPL-3.0",
}


def export_huggingface(
    run: str | Path,
    out: str | Path,
    *,
    which: str | int = "best",
    scores: str | Path | None = None,
    encoder_licence: str | None = None,
    about: str | Path | None = None,
    dtype: str = "float32",
) -> None:
    """Write a run as a transformers folder: weights, config, tokenizer, the model's code and a model card.

    `scores` is a folder that `pathflip evaluate` wrote for this run: the card reports its metrics with intervals and
    baselines, and `scores.json` holds all of the aligner. `encoder_licence` is the licence of a patch encoder that is
    neither in `vision/recipes.py` nor in `ENCODER_LICENCES`, `about` a file of Markdown for the card about the training
    data, `dtype` the type of the weights. The folder is written atomically; FileExistsError for an existing folder that
    is not empty, ValueError for the scores of another run and for weights out of the range of float16.
    """
    found = None if scores is None else read_scores(scores, run)
    described = None if about is None else read_about(about)
    with atomic_folder(out) as part:
        loaded = load(run, which)
        write_huggingface(part, loaded.model, loaded.config, loaded.tokenizer, dtype)
        (part / "README.md").write_text(
            card(loaded.model.config, loaded.config, found, encoder_licence, described), encoding="utf-8"
        )
        if found is not None:
            kept = {key: value for key, value in found.items() if key not in LEFT_OUT}
            write_json(part / "scores.json", kept, indent=1)


def write_huggingface(part: Path, model, settings: dict, tokenizer, dtype: str = "float32") -> None:
    """Write the files that transformers loads: weights, config, tokenizer and the model's code."""
    state, config, more = merged_state(model, dtype)
    tokenizer.save(part)
    write_checkpoint(part / "model.safetensors", state)
    _write(part / "config.json", huggingface_config(config, settings, dtype, **more))
    _write(part / "tokenizer_config.json", _tokenizer_config(part, settings, config))
    copy_code(export_of(config).code, part)


def huggingface_config(config: ModelConfig, settings: dict, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """config.json for transformers: its standard entries, the model's settings, and the description of the run."""
    code, name, _, _ = export_of(config)
    classes = {"AutoConfig": f"{code}.{name}Config", "AutoModel": f"{code}.{name}Model"}
    facts = {"model_type": config.family, "architectures": [f"{name}Model"], "auto_map": classes, "dtype": dtype}
    sizes = {REGION_TOP_K if key == "top_k" else key: value for key, value in config.to_dict().items()}
    return facts | sizes | describe_export(config, settings, **more)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tokenizer_config(folder: Path, settings: dict, config: ModelConfig) -> dict[str, Any]:
    """Settings that AutoTokenizer needs, since the config names no tokenizer known to it."""
    path = folder / "tokenizer_config.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    words = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]"}
    return there | words | named | {"model_max_length": caption_length(config, settings)}


def read_score_file(folder: str | Path) -> tuple[Path, dict]:
    """Path and content of the scores.json of an evaluation, the folder or the file. Raises OSError or ValueError."""
    path = Path(folder)
    path = path / "scores.json" if path.is_dir() else path
    try:
        return path, json_object(path, path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the --out of `pathflip evaluate`") from None
    except ValueError as error:
        raise ValueError(f"{error}; run `pathflip evaluate` again") from error


def read_scores(folder: str | Path, run: str | Path) -> dict:
    """Read the scores.json of an evaluation. Raises ValueError where it belongs to another run."""
    path, scores = read_score_file(folder)
    names = [PurePosixPath(name).name for name in scores.get("runs", [])]
    if names != [Path(run).name]:
        raise ValueError(
            f"{path}: scores of {', '.join(names) or 'no run'}, not of {Path(run).name} alone; evaluate this run"
        )
    return scores


def read_about(path: str | Path) -> str:
    """Text about the training data. Raises FileNotFoundError or ValueError for a file that holds none."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give a text file about the training data") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; save it as one") from None
    if not text:
        raise ValueError(f"{path}: empty; describe the training data in it, or leave out --about")
    return text


def figures(scores: dict) -> Iterator[dict[str, Any]]:
    """Rows of the card: the metric, its value with interval, and the baseline that ignores the slide."""

    def row(what: str, entry: dict, **baselines) -> dict[str, Any]:
        return {"what": what, "entry": entry, "baselines": {k: v for k, v in baselines.items() if v is not None}}

    for direction, galleries in scores.get("retrieval", {}).items():
        block = galleries["all"]
        for k in (1, 5, 10):
            if (entry := block.get(f"R@{k}")) is not None:
                what = f"Retrieval, {direction.replace('_', ' ')}, R@{k} of {block['gallery']}"
                yield row(what, entry, chance=entry.get("chance"))
    for task, how in ((scores.get("zero_shot"), ""), (scores.get("zero_shot_windows"), " by windows")):
        for metric in ("balanced_accuracy", "auc", "weighted_f1") if task else ():
            entry = task["metrics"][metric]
            what = f"Zero-shot {task['task'] or 'classification'}{how}, {len(task['classes'])} classes, {metric}"
            yield row(what, entry, chance=entry.get("chance"), majority=entry.get("majority"))
    if "grounding" in scores:
        entry = scores["grounding"]["auc"]
        colour = entry.get("mean_colour")
        value = colour["value"] if isinstance(colour, dict) else None
        yield row("Grounding, ROC AUC of patches", entry, chance=entry.get("chance"), **{"mean colour": value})


def recipe_words(facts: dict[str, Any] | None) -> str:
    """Known facts about how the features of a run's records were made, for its model card; "" if there are none."""
    recipe = FeatureRecipe.from_dict(facts or {})
    transform = {name: " ".join(map(str, x)) if isinstance(x, list) else x for name, x in recipe.transform.items()}
    words = [
        f"version {recipe.encoder_version}" if recipe.encoder_version else "",
        f"weights with SHA-256 `{recipe.weights}`" if recipe.weights else "",
        f"patches of {patch_words(recipe)}" if recipe.patch_size or recipe.patch_um else "",
        ", ".join(f"{name} {value}" for name, value in transform.items()),
        f"pooling {recipe.pooling}" if recipe.pooling else "",
        f"computed in {recipe.precision}" if recipe.precision else "",
    ]
    return "; ".join(filter(None, words))


def card(
    config: ModelConfig,
    settings: dict,
    scores: dict | None,
    encoder_licence: str | None = None,
    about: str | None = None,
) -> str:
    """Model card (README.md) of the folder: the model, its data and encoder, its scores, and loading instructions.

    Files of the run are named without their folders; `about` describes them.
    """
    data, train = settings.get("data", {}), settings.get("train", {})
    encoder = str(data.get("encoder") or "")
    published = find_recipe(encoder.rpartition(":")[2])
    licence = encoder_licence or (published.licence if published else ENCODER_LICENCES.get(encoder.lower()))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    files = {name: PurePosixPath(str(data[name])).name for name in ("records", "texts", "slides") if data.get(name)}
    return environment.get_template(CARD).render(
        config=config, patchwise=family_of(config).patchwise, code=export_of(config).code, encoder=encoder,
        repository=published.repository if published else "", recipe=recipe_words(data.get("recipe")),
        licence=licence, files=files, hashes=data.get("hashes") or {}, data=data,
        train=train, loss=settings.get("loss", {}), origin=settings.get("converted_from"),
        scores=scores, about=about, figures=list(figures(scores)) if scores else [],
    )  # fmt: skip
