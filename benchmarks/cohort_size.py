"""Time and memory to open a cohort, by its number of slides; every size in a separate process.

The cohort is generated: indexes and manifest describe slides with `--regions` regions on average, between 0.5 and 1.5
times that number, 32 slides per shard as `pathflip prepare` writes them. The shards are sparse files of the right size,
since opening a cohort does not read them. The time starts with the import of the library and ends when a slide can be
read: the manifest is compared, every index is read and checked, and the slides are checked against each other. The
indexes are in the page cache. Memory is the highest resident size of the process (VmHWM). `ids` is the time to get the
id of every slide.

    python benchmarks/cohort_size.py --json cohort_size.json --plot cohort_size.png
    python benchmarks/cohort_size.py --small            # up to 10,000 slides, in seconds
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import describe, resident_peak

SLIDES, SMALL = [1_000, 10_000, 100_000, 1_000_000], [1_000, 10_000]
SLIDES_PER_SHARD = 32
WIDTH, PATCHES_PER_REGION = 512, 150
TOKEN = "######"  # placeholder in an index for the number of its shard
WANTED = {100_000: (4.0, 300e6), 1_000_000: (40.0, 2e9)}  # targets: seconds, bytes


def make_infos(regions: int, seed: int) -> list:
    """Index entries of the slides of a shard, each with about `regions` regions."""
    from pathflip_jax.data.records.columns import SlideInfo

    rng, end, infos = np.random.default_rng(seed), 100, []
    for size in rng.integers(max(regions // 2, 1), regions * 3 // 2, SLIDES_PER_SHARD, endpoint=True):
        rows = np.cumsum([0, *rng.integers(1, 2 * PATCHES_PER_REGION, size)])
        grid, crcs = rng.integers(0, 64, (size, 2), np.int32), rng.integers(0, 2**32, size, np.uint32)
        patches, coords = int(rows[-1]), end + 2 * WIDTH * int(rows[-1])
        numbers = {"feature_dim": WIDTH, "num_patches": patches, "patch_size": 256, "width": 131_072, "height": 131_072}
        places = {"features_offset": end, "coords_offset": coords, "coords_bytes": 8 * patches, "coords_crc32c": 1}
        mpp, end = float(rng.choice([0.25, 0.2525, 0.5, 0.5021])), coords + 8 * patches + 100
        numbers["patch_size"] = 512 if mpp < 0.4 else 256
        infos.append(SlideInfo("", "", "uni", "float16", mpp=mpp, **numbers, **places, region_rows=rows,
                               region_grid=grid, region_crc32c=crcs))  # fmt: skip
    return infos


def make_cohort(folder: Path, slides: int, regions: int, seed: int) -> None:
    """Write a complete folder of records with sparse shards, whose indexes differ only in the slide ids."""
    from pathflip_jax.data.records.index import index_path
    from pathflip_jax.data.records.index_file import Index, encode_index
    from pathflip_jax.data.records.records import shard_name
    from pathflip_jax.data.storage.framing import crc32c

    folder.mkdir()
    ids = [f"TCGA-{TOKEN}-{i:02d}" for i in range(SLIDES_PER_SHARD)]
    infos = [
        replace(info, slide_id=f"{name}-01Z-00-DX1", case_id=name)
        for name, info in zip(ids, make_infos(regions, seed), strict=True)
    ]
    size, shards = infos[-1].coords_offset + infos[-1].coords_bytes + 100, []
    whole = encode_index(Index(size, 0, infos))[:-4]
    rest = encode_index(Index(size, 0, infos[: slides % SLIDES_PER_SHARD]))[:-4]
    for number in range(-(-slides // SLIDES_PER_SHARD)):
        count = min(SLIDES_PER_SHARD, slides - number * SLIDES_PER_SHARD)
        shard, own = folder / shard_name(number), f"{number:06d}"
        with shard.open("wb") as file:
            file.truncate(size)
        data = (whole if count == SLIDES_PER_SHARD else rest).replace(TOKEN.encode(), own.encode())
        index_path(shard).write_bytes(data + struct.pack("<I", crc32c(data)))
        names = [info.slide_id.replace(TOKEN, own) for info in infos[:count]]
        shards.append({"name": shard.name, "bytes": size, "crc32c": "00000000", "slides": names})
    manifest = {"version": 1, "cut": "grid", "edge_um": 2048.0, "edge_px": None, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def open_cohort(folder: Path) -> dict:
    """Seconds and bytes of opening, in this process."""
    start, used = time.perf_counter(), time.process_time()
    from pathflip_jax.data.records.records import Records

    imported = time.perf_counter()
    records = Records(folder)
    opened, peak = time.perf_counter(), resident_peak()
    cpu = time.process_time() - used
    ids = len({info.slide_id for info in records.slides})
    found = {"slides": ids, "seconds": opened - start, "import_seconds": imported - start, "cpu_seconds": cpu}
    return found | {"ids_seconds": time.perf_counter() - opened, "peak_bytes": peak}


def run_apart(*arguments: str) -> str:
    """Output of this script in a separate process. Raises RuntimeError with its last output if it fails."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def plot(rows: list[dict], path: Path) -> None:
    """Plot seconds and memory over the slides, with the targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    slides = [row["slides"] for row in rows]
    for panel, key, at, scale, label in (
        (panels[0], "seconds", 0, 1.0, "seconds to open"),
        (panels[1], "peak_bytes", 1, 1e9, "peak memory, GB"),
    ):
        panel.plot(slides, [row[key] / scale for row in rows], "o-", color="#1f5a96", markersize=4, label="measured")
        panel.plot(
            list(WANTED), [wanted[at] / scale for wanted in WANTED.values()], "x", color="#999999", label="target"
        )
        panel.set(xscale="log", yscale="log", xlabel="slides", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(options: argparse.Namespace) -> list[dict]:
    """One row per size: the fastest repeat and its memory."""
    rows = []
    print(f"{'slides':>9}{'seconds':>9}{'cpu s':>8}{'ids s':>8}{'peak MB':>9}", flush=True)
    for slides in options.slides:
        with tempfile.TemporaryDirectory(dir=options.folder) as parent:
            folder = Path(parent) / "records"
            run_apart(
                "--make", str(folder), f"--slides={slides}", f"--regions={options.regions}", f"--seed={options.seed}"
            )
            found = [json.loads(run_apart("--open", str(folder))) for _ in range(options.repeats)]
        row = min(found, key=lambda one: one["seconds"]) | {"seconds_all": [one["seconds"] for one in found]}
        rows.append(row)
        figures = (
            f"{row['seconds']:>9.2f}{row['cpu_seconds']:>8.2f}{row['ids_seconds']:>8.2f}{row['peak_bytes'] / 1e6:>9.0f}"
        )
        seconds, size = WANTED.get(slides, (0, 0))
        print(f"{slides:>9}{figures}" + (f"  target: {seconds:g} s, {size / 1e6:g} MB" if seconds else ""), flush=True)
    return rows


def main() -> int:
    """Measure every size, print the table, write plot and JSON; the exit code is 1 if a size could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, nargs="+", help="numbers of slides; 1,000 to 1,000,000 by default")
    parser.add_argument("--small", action="store_true", help="up to 10,000 slides")
    parser.add_argument("--regions", type=int, default=100, help="regions per slide, on average (100)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="folder to write to, 2 GB for 1,000,000 slides; a temporary folder by default"
    )
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--make", type=Path, help="only make one cohort there")
    parser.add_argument("--open", type=Path, help="only open that cohort and print JSON")
    options = parser.parse_args()
    options.slides = options.slides or (SMALL if options.small else SLIDES)
    if options.make:
        make_cohort(options.make, options.slides[0], options.regions, options.seed)
    elif options.open:
        print(json.dumps(open_cohort(options.open)))
    if options.make or options.open:
        return 0
    described = describe("numpy", "google-crc32c")
    try:
        rows = measure(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(options, name) for name in ("slides", "regions", "repeats", "seed")}
        options.json.write_text(
            json.dumps({"machine": described, "settings": settings, "results": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
