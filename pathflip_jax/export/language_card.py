"""Model card of a language run's export."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from pathflip_jax.evaluate.tasks.language import KEY, TASK
from pathflip_jax.export.huggingface import read_score_file

CARD = "language_card.md"


def read_language_scores(folder: str | Path, run: str | Path) -> dict[str, Any]:
    """Read the scores.json of an evaluation. Raises ValueError where it does not score this language run."""
    path, scores = read_score_file(folder)
    scored = scores.get(KEY, {}).get("run", "")
    if PurePosixPath(scored).name != Path(str(run)).name:
        raise ValueError(
            f"{path}: scores of {scored or 'no language run'}, not of {Path(str(run)).name}; evaluate this run"
        )
    return scores


def language_card(settings: Mapping[str, Any], scores: Mapping[str, Any] | None, about: str | None) -> str:
    """Model card (README.md) from the settings of a language run; `about` describes its training data."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    lm, data = settings["lm"], settings.get("data", {})
    rank = lm.get("lora_rank") if "lora" in lm["trains"] else None
    decoder = "" if lm.get("random_decoder") else PurePosixPath(str(lm.get("decoder") or "")).name
    return environment.get_template(CARD).render(
        decoder=decoder, encoder=data.get("encoder") or "", trains=lm["trains"], rank=rank, data=data,
        train=settings.get("train", {}), about=about, scores=scores,
        rows=list(TASK.headlines(scores)) if scores else [],
    )  # fmt: skip
