"""Throughput of the input pipeline compared with a torch DataLoader that reads whole files, in one run.

Our side reads records from disk with `make_batches` as training does: it draws regions, patches and subcaptions, packs
tokens, and checks every region's CRC32C. The other side works like the released code: a DataLoader worker loads all
features of a slide (float16; the h5 array is contiguous; the released code reads .pt), divides them into runs of 256
patches, draws as many runs as we draw regions, and tokenises caption and subcaptions padded to their maximum lengths.

A repeat is `--epochs` epochs, from the creation of the iterator to its last batch; the workers of the DataLoader are
started before. "cold": every file is fsynced and dropped from the page cache before each epoch; "warm": all files are
in the page cache; "resident": our features are in memory, compared with the DataLoader when warm. Ratios compare the
bytes of features delivered per second, so that fuller regions count for more, within the same repeat, in an order
redrawn each time; the script prints their median and quartiles. The time of a stage is that of one thread alone,
without read-ahead.

    python benchmarks/input.py --json benchmarks/results/input.json
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import grain
import numpy as np

try:
    import h5py
    import torch
    from machine import describe
    from made_captions import CAPTION_LENGTH, make_captions
    from records import drop, make_slide, sync, write_records
    from transformers import AutoTokenizer
except ImportError as error:
    raise SystemExit(
        f"{error.name} is missing, which one side of the comparison needs: pip install {error.name}"
    ) from None

from pathflip_jax.data.batches.pipeline import Batches, BatchSize, Cohort, make_batches
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.captions import sample_subcaptions, split_sentences
from pathflip_jax.data.texts.text import SlideText
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.settings.sections import AlignmentDataSettings

OURS, H5, PT = "records", "h5", ".pt"
RUN, SUBCAPTIONS, SUBCAPTION_LENGTH = 256, 8, 192


class Source(torch.utils.data.Dataset):
    """Dataset read as in the released code: the whole file, in runs of 256 patches, some of which are drawn."""

    def __init__(self, paths: list[Path], captions: list[str], tokenizer, regions: int) -> None:
        self.paths, self.captions, self.tokenizer, self.regions = paths, captions, tokenizer, regions
        self.sentences = [split_sentences(caption) for caption in captions]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> torch.Tensor:
        """All features of slide i, [N, F]."""
        if self.paths[i].suffix == ".pt":
            return torch.load(self.paths[i], weights_only=True)
        with h5py.File(self.paths[i], "r") as file:
            return torch.from_numpy(file["features"][()])

    def tokens(self, texts: list[str], length: int) -> torch.Tensor:
        """Token ids padded to `length`, stacked with the mask."""
        padded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return torch.stack([padded["input_ids"], padded["attention_mask"]])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        features = self.load(i)
        runs = features[: len(features) // RUN * RUN].reshape(-1, RUN, features.shape[1])
        chosen = torch.from_numpy(np.sort(np.random.choice(len(runs), min(self.regions, len(runs)), replace=False)))
        subcaptions = sample_subcaptions(self.sentences[i], SUBCAPTIONS, np.random.default_rng(random.getrandbits(64)))
        return {
            "patches": runs[chosen],
            "caption": self.tokens([self.captions[i]], CAPTION_LENGTH),
            "subcaptions": self.tokens(subcaptions, SUBCAPTION_LENGTH),
        }


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers does the same after a fork, but with a warning


def make_loader(source: Source, batch_size: int, workers: int) -> torch.utils.data.DataLoader:
    """The DataLoader of the released code, its workers started."""
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=batch_size,
        num_workers=workers,
        shuffle=True,
        drop_last=True,
        persistent_workers=True,
        worker_init_fn=_start_worker,
    )
    for _ in loader:
        pass
    return loader


def deliver_ours(batches: Batches, epochs: int, threads: int) -> Iterable[tuple[int, int]]:
    """Slides and bytes of features of each batch, as in `Batches.__iter__`, but finite."""
    steps = grain.MapDataset.range(0, epochs * batches.steps_per_epoch).map(batches.batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    for batch in steps.to_iter_dataset(options):
        width = batch.patches.shape[-1] * batch.patches.itemsize
        yield len(batch.slide), int(np.count_nonzero(batch.patch_mask)) * width


def deliver_theirs(loader: torch.utils.data.DataLoader, epochs: int) -> Iterable[tuple[int, int]]:
    """Slides and bytes of features of each batch of a DataLoader."""
    for _ in range(epochs):
        for batch in loader:
            yield len(batch["patches"]), batch["patches"].nbytes


def rate(deliveries: Iterable[tuple[int, int]], slides: int) -> tuple[float, float]:
    """Slides and bytes per second over all deliveries. Raises RuntimeError unless these are `slides` slides."""
    start = time.perf_counter()
    counts = list(deliveries)
    seconds = time.perf_counter() - start
    found = sum(count for count, _ in counts)
    if found != slides:
        raise RuntimeError(f"{found} slides were delivered, expected {slides}")
    return found / seconds, sum(size for _, size in counts) / seconds


@contextmanager
def timed(owner: object, name: str, seconds: dict[str, float], stage: str):
    """Add the time of every call of a method to a stage, while the context lasts."""
    call = getattr(owner, name)

    def wrapped(*arguments):
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            seconds[stage] += time.perf_counter() - start

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        delattr(owner, name)


def stages(batches: Batches, records: Records, repeats: int) -> dict[str, float]:
    """Milliseconds a slide of every stage of the pipeline, in one thread: the epoch of median time."""
    epochs = []
    for epoch in range(1 + repeats):
        seconds = dict.fromkeys(("features", "reading", "text", "all"), 0.0)
        with (
            timed(batches._patches, "draw", seconds, "features"),
            timed(records, "read_regions", seconds, "reading"),
            timed(batches, "_pack", seconds, "text"),
            timed(batches, "batch", seconds, "all"),
        ):
            first = epoch * batches.steps_per_epoch
            slides = sum(len(batches.batch(first + step).slide) for step in range(batches.steps_per_epoch))
        epochs.append({stage: 1e3 * x / slides for stage, x in seconds.items()})
    found = sorted(epochs[1:], key=lambda epoch: epoch["all"])[repeats // 2]  # the first maps the batches' memory
    found["sampling, copying"] = found.pop("features") - found["reading"]
    found["rest"] = found["all"] - found["sampling, copying"] - found["reading"] - found["text"]
    return found


def compare(ours: list[float], theirs: list[float]) -> dict[str, float | list[float]]:
    """Speed-up of ours, repeat by repeat: the median and the quartiles."""
    low, ratio, high = np.quantile([a / b for a, b in zip(ours, theirs, strict=True)], [0.25, 0.5, 0.75]).tolist()
    return {"ratio": ratio, "quartiles": [low, high]}


def summarise(rates: dict[str, dict[str, list[tuple[float, float]]]]) -> dict:
    """Medians and ratios by state and format, from (slides, bytes) per second of each repeat."""
    results = {}
    for state, by_name in rates.items():
        results[state] = {}
        for name, found in by_name.items():
            slides, sizes = (statistics.median(column) for column in zip(*found, strict=True))
            figures = compare([size for _, size in by_name[OURS]], [size for _, size in found])
            results[state][name] = {"slides_per_s": slides, "gb_per_s": sizes / 1e9, **figures}
    return results


class Bench:
    """Slides, captions and vocabulary in every format, the pipeline and the loaders that read them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        rng = np.random.default_rng(options.seed)
        captions = make_captions(options.slides, folder / "vocabulary", rng)
        self.files = {name: [folder / f"{i}{suffix}" for i in range(options.slides)] for name, suffix in
                      ((H5, ".h5"), (PT, ".pt"))}  # fmt: skip
        write_records(folder / "records", (self._write(i) for i in range(options.slides)))
        self.records = Records(folder / "records")
        self.files[OURS] = self.records.shards
        vocabulary = AutoTokenizer.from_pretrained(folder / "vocabulary")
        self.loaders = {  # created before our threads start, because their workers are forked
            name: make_loader(
                Source(self.files[name], captions, vocabulary, options.regions), options.batch_size, options.workers
            )
            for name in (H5, PT)
        }
        texts = [SlideText((f"slide{i}",), "", caption) for i, caption in enumerate(captions)]
        tokenizer = TextTokenizer(folder / "vocabulary")
        self.caption_tokens = statistics.mean(len(ids) + 2 for ids in tokenizer.ids(captions))

        def batches(**more) -> Batches:
            data = AlignmentDataSettings(
                regions=options.regions, subcaptions=SUBCAPTIONS, caption_length=CAPTION_LENGTH,
                subcaption_length=SUBCAPTION_LENGTH, threads=options.threads, **more,
            )  # fmt: skip
            cohort = Cohort(self.records, texts, tokenizer)
            return make_batches(cohort, data, BatchSize(options.batch_size), seed=options.seed)

        self.batches = batches()
        self.fewer = batches(patch_slots=max(1, self.batches.patch_slots * 3 // 4))
        self.resident = batches(resident="host")

    def _write(self, i: int):
        slide = make_slide(i, self.options.patches, self.options.width)
        with h5py.File(self.files[H5][i], "w") as file:
            file["features"], file["coords"] = slide.features, slide.coords
        torch.save(torch.from_numpy(slide.features), self.files[PT][i])
        for name in (H5, PT):
            sync(self.files[name][i])
        return slide

    def rate(self, name: str, state: str) -> tuple[float, float]:
        """Slides and bytes per second of a format in a state of the cache."""
        options, rounds = self.options, []
        each = 1 if state == "cold" else options.epochs
        for _ in range(options.epochs // each):
            for path in self.files[name]:
                if state == "cold":
                    drop(path)
                elif state == "warm":
                    path.read_bytes()
            if name == OURS:
                batches = self.resident if state == "resident" else self.batches
                found = deliver_ours(batches, each, options.threads)
            else:
                found = deliver_theirs(self.loaders[name], each)
            rounds.append(rate(found, each * options.slides // options.batch_size * options.batch_size))
        return tuple(statistics.harmonic_mean(column) for column in zip(*rounds, strict=True))

    def measure(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """(slides, bytes) per second of every state, format and repeat."""
        rng = np.random.default_rng(self.options.seed)
        tasks = [(state, name) for state in ("cold", "warm") for name in (OURS, H5, PT)] + [("resident", OURS)]
        rates = {state: {} for state in ("cold", "warm", "resident")}
        for _ in range(self.options.repeats):
            for state, name in rng.permutation(tasks).tolist():
                rates[state].setdefault(name, []).append(self.rate(name, state))
        rates["resident"] |= {name: rates["warm"][name] for name in (H5, PT)}
        return {state: {name: by_name[name] for name in (OURS, H5, PT)} for state, by_name in rates.items()}

    def stages(self) -> dict[str, dict[str, float]]:
        """Milliseconds per slide of each stage, by where features are read from."""
        slots = self.batches.patch_slots
        several = {
            "warm": self.batches,
            f"warm, {self.fewer.patch_slots} of {slots} patches drawn": self.fewer,
            "resident": self.resident,
        }
        return {name: stages(batches, self.records, self.options.repeats) for name, batches in several.items()}


def make_parser() -> argparse.ArgumentParser:
    """Command-line parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=32)
    parser.add_argument("--patches", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--regions", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=4, help="threads of our pipeline (4)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the DataLoader (2)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per repeat (2)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder to write to; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser


def check(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError for options that cannot give a valid measurement, before anything is written."""
    if options.slides < options.batch_size or options.patches < RUN or options.workers < 1:
        raise ValueError(
            f"--slides {options.slides}, --batch-size {options.batch_size}, --patches {options.patches}, --workers "
            f"{options.workers}: expected at least one whole batch per epoch, {RUN} patches per slide and one worker"
        )
    files = 3 * options.slides * options.patches * options.width * 2
    free, memory = shutil.disk_usage(folder).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if files * 1.1 > free:
        raise ValueError(f"{folder}: {files / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; lower --slides")
    if (
        files * 2 > memory
    ):  # the page cache holds all three formats, and memory holds one of them twice while loading it
        raise ValueError(
            f"{files / 1e9:.1f} GB of files and the resident features do not fit together in {memory / 1e9:.1f} GB of "
            "memory; lower --slides"
        )


def main() -> int:
    """Measure, print the tables, write the JSON."""
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            check(options, Path(folder))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        described = describe("numpy", "h5py", "torch", "google-crc32c", folder=Path(folder))
        bench = Bench(Path(folder), options)
        results = summarise(bench.measure())
        by_stage = bench.stages()
    print(
        f"{options.slides} slides of {options.patches} patches x {options.width} float16, {options.regions} regions "
        f"of {RUN}, captions of {bench.caption_tokens:.0f} tokens, {options.repeats} repeats"
    )
    print(f"{'':<10}{'format':<10}{'slides/s':>10}{'GB/s used':>11}  speed-up of records (quartiles)")
    for state, by_name in results.items():
        for name, found in by_name.items():
            low, high = found["quartiles"]
            faster = "" if name == OURS else f"  {found['ratio']:.2f}x as fast ({low:.2f} to {high:.2f})"
            print(f"{state:<10}{name:<10}{found['slides_per_s']:>10.1f}{found['gb_per_s']:>11.2f}{faster}")
    print("\nms per slide, one thread")
    for state, found in by_stage.items():
        print(f"{state:<36}" + "  ".join(f"{stage} {ms:.2f}" for stage, ms in found.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "folder")}
        settings["caption_tokens"] = bench.caption_tokens
        content = {"machine": described, "settings": settings, "results": results, "stages_ms_per_slide": by_stage}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
