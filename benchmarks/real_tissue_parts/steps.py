"""Commands of the benchmark: the product's own, one after the other, each skipped once it is finished."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pathflip_jax.commands.demo_steps import Step
from pathflip_jax.data.storage.json_files import read_json
from real_tissue_parts.mosaics import MASKS, OUTLINES

REGION, NO_REGION, LANGUAGE = "region", "no_region", "language"
ABOUT = Path(__file__).with_name("about_ebhi_seg.md")  # for the card of a run
DECODER = ["--decoder", "64", "2", "--size", "800"]


class Places(NamedTuple):
    """The folders of a benchmark: features are shared by all `name`s of runs, and runs by both splits to score."""

    out: Path
    name: str
    split: str

    @property
    def slides(self) -> Path:
        """The cohort: slides or imported features, tables, outlines, prompts."""
        return self.out / "slides"

    @property
    def records(self) -> Path:
        """The patch features."""
        return self.out / "records"

    @property
    def vocabulary(self) -> Path:
        """The WordPiece vocabulary of the training captions."""
        return self.out / "vocabulary"

    @property
    def decoder(self) -> Path:
        """The untrained decoder of the language stage."""
        return self.out / "decoder"

    def run(self, seed: int, kind: str) -> Path:
        """The folder of one training."""
        return self.out / self.name / f"seed{seed}_{kind}"

    def scores(self, seed: int, kind: str, outlines: str = OUTLINES) -> Path:
        """The folder of one evaluation."""
        return self.out / self.name / f"seed{seed}_{kind}_{self.split}{'_masks' * (outlines == MASKS)}"


def prepare_steps(places: Places, patch: int, edge_um: float, workers: int) -> list[Step]:
    """Slides to features."""
    command = ["pathflip", "prepare", str(places.slides), "--out", str(places.records), "--patch-size", str(patch)]
    command += ["--edge-um", f"{edge_um:g}", "--slides", f"{places.slides}/slides.csv", "--workers", str(workers)]
    return [Step("Slides to patch features in TFRecords", command)]


def import_steps(places: Places, edge_um: float, mpp: float, encoder: str) -> list[Step]:
    """Feature files to records."""
    command = ["pathflip", "import", f"{places.slides}/features", "--out", str(places.records), "--mpp", f"{mpp:g}"]
    command += ["--edge-um", f"{edge_um:g}", "--encoder", encoder, "--slides", f"{places.slides}/slides.csv"]
    return [Step("Texture features to TFRecords", command)]


def vocabulary_steps(places: Places, language: bool) -> list[Step]:
    """A vocabulary of the training captions, and with `language` an untrained decoder."""
    words = ["pathflip", "vocabulary", f"{places.slides}/reports.jsonl", "--slides", f"{places.slides}/slides.csv"]
    words += ["--split", "train", "--out"]
    found = []
    if not places.vocabulary.exists():
        found.append(Step("A WordPiece vocabulary from the training captions", [*words, str(places.vocabulary)]))
    if language and not places.decoder.exists():
        found.append(Step("The folder of a small decoder", [*words, str(places.decoder), *DECODER]))
    return found


def train_steps(places: Places, seed: int, options: argparse.Namespace) -> list[Step]:
    """Training with and without the region loss, side by side, and with `--language` of a decoder."""
    texts = [f"--config.data.records={places.records}", f"--config.data.texts={places.slides}/reports.jsonl"]
    texts += [f"--config.data.slides={places.slides}/slides.csv", f"--config.train.seed={seed}"]
    train = ["pathflip", "train", "--config", options.config, *texts]
    train += [f"--config.data.tokenizer={places.vocabulary}"]
    train += [f"--config.{setting}" for setting in options.set]
    ours, without = places.run(seed, REGION), places.run(seed, NO_REGION)
    slide_loss = [*train, "--config.loss.region_weight=0.0", "--workdir", str(without)]
    found = [Step(f"Seed {seed}: training with slide and region loss", [*train, "--workdir", str(ours)])]
    if NO_REGION in options.kinds:
        found.append(Step(f"Seed {seed}: training with the slide loss alone", slide_loss, with_previous=True))
    if options.language:
        speak = ["pathflip", "train", "--config", options.language_config, *texts]
        speak += [f"--config.lm.aligner={ours}", f"--config.lm.decoder={places.decoder}"]
        speak += [f"--config.{setting}" for setting in options.language_set]
        speak += ["--workdir", str(places.run(seed, LANGUAGE))]
        found.append(Step(f"Seed {seed}: training a decoder to caption slides", speak))
    return found


def evaluate_steps(places: Places, seed: int, options: argparse.Namespace) -> list[Step]:
    """Evaluation of the runs side by side, but for those whose scores are of this very command.

    Masks, a second truth for grounding, are scored on test slides only.
    """
    found = []
    for outlines in (OUTLINES, MASKS) if places.split == "test" else (OUTLINES,):
        beside = False
        for kind in options.kinds if (places.slides / outlines).is_dir() else ():
            out = places.scores(seed, kind, outlines)
            command = _evaluate(places, seed, kind, outlines, options) + ["--out", str(out), *options.more]
            if not is_scored(out, command):
                title = f"Seed {seed}: scores {kind.replace('_', ' ')}, {outlines}"
                found.append(Step(title, command, with_previous=beside))
                beside = True
    return found


def export_steps(places: Places, seed: int, options: argparse.Namespace) -> list[Step]:
    """The run of a seed as a folder for transformers, of half the size, with a card that holds its scores."""
    run, out = places.run(seed, REGION), places.out / places.name / options.export
    if out.exists():
        return []
    command = ["pathflip", "export", str(run), "--to", "huggingface", "--dtype", "float16", "--out", str(out)]
    command += ["--scores", str(places.scores(seed, REGION)), "--about", str(ABOUT)]
    return [Step(f"Seed {seed}: export with a model card", command)]


def _evaluate(places: Places, seed: int, kind: str, outlines: str, options: argparse.Namespace) -> list[str]:
    slides = places.slides
    command = ["pathflip", "evaluate", str(places.run(seed, kind)), "--records", str(places.records)]
    command += ["--slides", f"{slides}/slides.csv", "--split", places.split]
    command += ["--grounding", f"{slides}/grounding.json", "--outlines", f"{slides}/{outlines}"]
    if any(slides.glob("*.tiff")):
        command += ["--images", str(slides)]
    if outlines != OUTLINES:  # all but grounding is the same
        return command
    command += ["--texts", f"{slides}/reports.jsonl", "--prompts", f"{slides}/prompts.json"]
    command += ["--zero-shot-windows", "--few-shot", "all", "--draws", "1"]
    if options.language and kind == REGION:
        command += ["--language", str(places.run(seed, LANGUAGE)), "--concepts", f"{slides}/concepts.json"]
        command += ["--min-tokens", "128", "--max-tokens", "192", "--repetition-penalty", "1.3"]
    return command


def is_scored(out: Path, command: Sequence[str]) -> bool:
    """Whether a folder holds the scores of this command."""
    if not (out / "scores.json").exists():
        return False
    return read_json(out / "scores.json")["command"] == list(command)[1:]  # recorded without the program's name
