"""The main job on the embedded cohort: slides -> records -> training -> scores -> report.

The demo is the command line's own commands, one after the other, each printed before it runs: whoever has
read its output knows how to do the same with slides of their own. Every step resumes, so a second run does
only what is missing.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

# The synthetic slides are small, so are their patches and regions: 64 pixels at 0.5 um, in squares of 128 um.
PATCH_SIZE = 64
REGION_EDGE_UM = 128.0
SLIDES, SLIDE_PIXELS = 440, 1280


def steps(out: Path, slides: int, seed: int, workers: int) -> list[tuple[str, list[str]]]:
    """Title and command line of each step, for a cohort of `slides` slides under `out`."""
    cohort, records, vocabulary = out / "slides", out / "records", out / "vocabulary"
    run, slide_only, decoder, language = (
        out / name for name in ("run", "run_slide_loss_only", "decoder", "run_language")
    )
    table = ["--slides", f"{cohort}/slides.csv"]
    train = ["pathflip", "train", "--config", "demo", f"--config.data.records={records}"]
    train += [f"--config.data.texts={cohort}/reports.jsonl", f"--config.data.slides={cohort}/slides.csv"]
    train += [f"--config.data.tokenizer={vocabulary}", f"--config.train.seed={seed}"]
    synthesize = [sys.executable, "-m", "data_prep.synthetic", "--out", str(cohort), "--slides", str(slides)]
    synthesize += ["--size", str(SLIDE_PIXELS)]
    prepare = ["pathflip", "prepare", str(cohort), "--out", str(records), "--patch-size", str(PATCH_SIZE)]
    speak = ["pathflip", "train", "--config", "lm_demo", f"--config.data.records={records}"]
    speak += [f"--config.data.texts={cohort}/reports.jsonl"]
    speak += [f"--config.data.slides={cohort}/slides.csv"]
    speak += [f"--config.lm.aligner={run}", f"--config.lm.decoder={decoder}", f"--config.train.seed={seed}"]
    embeddings = out / "embeddings.parquet"
    speak += [f"--config.data.embeddings={embeddings}"]
    embed = ["pathflip", "embed", str(records), "--checkpoint", str(run), "--regions", "--out", str(embeddings)]
    words = ["pathflip", "vocabulary", f"{cohort}/reports.jsonl", *table, "--split", "train", "--out"]
    evaluate = ["pathflip", "evaluate", str(run), "--compare-to", str(slide_only), "--records", str(records), *table]
    evaluate += ["--language", str(language), "--concepts", f"{cohort}/concepts.json"]
    evaluate += ["--max-tokens", "192", "--repetition-penalty", "1.3"]
    return [
        (
            "Slides, reports and outlines of the embedded cohort",
            [*synthesize, "--seed", str(seed), "--workers", str(workers)],
        ),
        (
            "Slides to patch features in TFRecords",
            [*prepare, "--edge-um", str(REGION_EDGE_UM), *table, "--workers", str(workers)],
        ),
        (
            "A WordPiece vocabulary from the training reports",
            [*words, str(vocabulary)],
        ),
        ("Training with slide and region loss", [*train, "--workdir", str(run)]),
        (
            "Training with the slide loss alone, for comparison",
            [*train, "--config.loss.region_weight=0.0", "--workdir", str(slide_only)],
        ),
        ("Embeddings of all slides and their regions", embed),
        ("The folder of a small decoder", [*words, str(decoder), "--decoder", "64", "2", "--size", "800"]),
        ("Training the decoder to report what slides show", [*speak, "--workdir", str(language)]),
        (
            "Scores on the held-out slides, and the report",
            [*evaluate, "--texts", f"{cohort}/reports.jsonl", "--prompts", f"{cohort}/prompts.json"]
            + ["--grounding", f"{cohort}/grounding.json", "--outlines", f"{cohort}/outlines"]
            + ["--images", str(cohort), "--split", "test", "--out", str(out)],
        ),
    ]


def run_demo(out: Path, *, slides: int = SLIDES, seed: int = 0, workers: int = 2) -> int:
    """Run every step in a process of its own, and say how long it took; return the exit code of the first that fails.

    Ends with the path of the report as the last line of output.
    """
    start = time.monotonic()
    plan = steps(out, slides, seed, workers)
    for number, (title, command) in enumerate(plan, 1):
        print(f"\n[{number}/{len(plan)}] {title}\n  $ {shlex.join(command)}", flush=True)
        if command[0] == "pathflip":
            command = [sys.executable, "-m", "pathflip_jax.cli", *command[1:]]
        began = time.monotonic()
        code = subprocess.run(command).returncode
        if code:
            print(f"Step {number} of the demo ended with exit code {code}; mend its cause and run the demo again.")
            return code
        print(f"  took {time.monotonic() - began:.0f} s", flush=True)
    print(f"\nThe demo took {(time.monotonic() - start) / 60:.1f} minutes. The report:\n{out / 'report.html'}")
    return 0
