"""Complete workflow on the synthetic cohort: slides -> records -> training -> scores -> report.

The demo consists of ordinary `pathflip` commands, each printed before it runs: its output shows how to process other
slides. Every step resumes, so a second run does only what is missing. Steps run one after the other, except that the
two aligners are trained in parallel, each on half of the cores: a training step of a model this small is no slower on
one core than on two.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

# The synthetic slides are small, so patches and regions are too: 64 pixels at 0.5 um per pixel, in squares of 128 um.
PATCH_SIZE = 64
REGION_EDGE_UM = 128.0
SLIDES, SLIDE_PIXELS = 440, 1280


class Step(NamedTuple):
    """Command of the demo; a step `with_previous` is independent of the previous one and runs in parallel with it."""

    title: str
    command: list[str]
    with_previous: bool = False


def steps(out: Path, slides: int, seed: int, workers: int) -> list[Step]:
    """Commands of the demo in order, for a cohort of `slides` slides under `out`."""
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
    words = ["pathflip", "vocabulary", f"{cohort}/reports.jsonl", *table, "--split", "train", "--out"]
    evaluate = ["pathflip", "evaluate", str(run), "--compare-to", str(slide_only), "--records", str(records), *table]
    evaluate += ["--language", str(language), "--concepts", f"{cohort}/concepts.json"]
    # Longer than most reports: half of their sentences are about what no slide shows, and a caption that spends as many
    # on it leaves findings out.
    evaluate += ["--min-tokens", "128", "--max-tokens", "192", "--repetition-penalty", "1.3"]
    evaluate += ["--texts", f"{cohort}/reports.jsonl", "--prompts", f"{cohort}/prompts.json"]
    evaluate += ["--grounding", f"{cohort}/grounding.json", "--outlines", f"{cohort}/outlines"]
    evaluate += ["--regression", "immune_score", "--clinical", "age", "stage"]
    if importlib.util.find_spec("sksurv") is not None:  # the extra `survival`, which a plain installation lacks
        evaluate += ["--survival-time", "os_months", "--survival-event", "os_event"]
    evaluate += ["--images", str(cohort), "--split", "test", "--out", str(out)]
    slide_loss = [*train, "--config.loss.region_weight=0.0", "--workdir", str(slide_only)]
    decoder_folder = [*words, str(decoder), "--decoder", "64", "2", "--size", "800"]
    return [
        Step(
            "Slides, reports and outlines of a synthetic cohort",
            [*synthesize, "--seed", str(seed), "--workers", str(workers)],
        ),
        Step(
            "Patch features of the slides, in TFRecords",
            [*prepare, "--edge-um", str(REGION_EDGE_UM), *table, "--workers", str(workers)],
        ),
        Step("A WordPiece vocabulary from the training reports", [*words, str(vocabulary)]),
        Step("Training with slide and region loss", [*train, "--workdir", str(run)]),
        Step("Training with the slide loss alone, for comparison", slide_loss, with_previous=True),
        Step("Folder of a small decoder", decoder_folder),
        Step("Training the decoder to write reports of slides", [*speak, "--workdir", str(language)]),
        Step("Scores on the held-out slides, and the report", evaluate),
    ]


def run_demo(out: Path, *, slides: int = SLIDES, seed: int = 0, workers: int = 2) -> int:
    """Run every step in a separate process, and print its duration; return the exit code of the first that fails.

    Ends with the path of the report as the last line of output.
    """
    start = time.monotonic()
    if code := run_steps(steps(out, slides, seed, workers), "the demo"):
        return code
    print(f"\nThe demo took {(time.monotonic() - start) / 60:.1f} minutes. The report:\n{out / 'report.html'}")
    return 0


def run_steps(plan: Sequence[Step], whole: str) -> int:
    """Run the steps of `whole` in separate processes, and print their durations.

    Returns 0, or the exit code of the first step that failed.
    """
    groups: list[list[tuple[int, Step]]] = []
    for number, step in enumerate(plan, 1):
        if not step.with_previous:
            groups.append([])
        groups[-1].append((number, step))
    for group in groups:
        print()
        for number, step in group:
            parallel = f" (in parallel with step {number - 1})" if step.with_previous else ""
            print(f"[{number}/{len(plan)}] {step.title}{parallel}\n  $ {shlex.join(step.command)}", flush=True)
        if code := _run_group(group, whole):
            return code
    return 0


def _run_group(group: list[tuple[int, Step]], whole: str) -> int:
    """Run steps in parallel; the first one's output is shown live, the others' after it.

    Returns 0, or the exit code of the step that failed first; the others are then terminated.
    """
    began, ended = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        logs = {number: open(Path(folder) / str(number), "w+b") for number, _ in group[1:]}
        running = {}
        try:
            for place, (number, step) in enumerate(group):
                with _share_of_cores(place, len(group)):
                    running[number] = _start(step.command, logs.get(number))
            while len(ended) < len(group) and not any(code for code, _ in ended.values()):
                time.sleep(0.05)
                for number, process in running.items():
                    if number not in ended and process.poll() is not None:
                        ended[number] = process.returncode, time.monotonic() - began
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.terminate()
                process.wait()
            for number, log in logs.items():
                print(f"Output of step {number}:", flush=True)
                log.seek(0)
                lines = log.read().decode(errors="replace").split("\n")
                print("\n".join(line.rpartition("\r")[2] for line in lines), end="", flush=True)  # bars: final state
                log.close()
    for number, (code, seconds) in sorted(ended.items()):
        if code:
            print(f"Step {number} of {whole} ended with exit code {code}; fix the cause and run {whole} again.")
            return code
        title = f"step {number} took" if len(group) > 1 else "took"
        print(f"  {title} {seconds:.0f} s", flush=True)
    return 0


def _start(command: list[str], log: IO[bytes] | None) -> subprocess.Popen:
    if command[0] == "pathflip":
        command = [sys.executable, "-m", "pathflip_jax.cli", *command[1:]]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT if log else None)


@contextmanager
def _share_of_cores(place: int, shares: int) -> Iterator[None]:
    """Restrict processes started in this context to one share of the cores, if the system supports CPU affinity."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 1 < shares <= len(cores):
        yield
        return
    os.sched_setaffinity(0, cores[place::shares])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
