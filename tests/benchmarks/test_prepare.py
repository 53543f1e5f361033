"""The benchmark of preparation: a complete run, and a huge slide prepared in little memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest

from pathflip_jax.data.records.records import Records

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("prepare")


def test_a_huge_slide_is_small_on_disk_and_whole_to_openslide(bench, tmp_path):
    bench.write_huge_slide(tmp_path / "s.tiff", 9000, 2048)
    assert (tmp_path / "s.tiff").stat().st_size < 3e6
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        assert slide.dimensions == (9000, 9000) and slide.properties[openslide.PROPERTY_NAME_MPP_X] == "0.5"
        assert slide.level_dimensions[1:] == ((2250, 2250), (563, 563), (141, 141))
        inside, outside = (np.asarray(slide.read_region((at, 100), 0, (8, 8)))[..., :3] for at in (2000, 2100))
    assert inside.mean() < 190 and (outside == 242).all()


def test_the_plain_loop_reads_the_same_patches(bench, tmp_path):
    bench.make_slides(tmp_path, 2, 1024)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["S0.tiff", "S1.tiff"]
    with bench.open_slide(tmp_path / "S1.tiff") as slide:
        tiles = bench.tile_slide(slide, 256, 0.5)
        plain, ours = np.stack(list(bench.plain_loop(slide, tiles))), list(bench.read_patches(slide, tiles))
        np.testing.assert_array_equal(plain, np.concatenate(ours))
        tiles = bench.tile_slide(slide, 128, 1.0)
        plain, ours = np.stack(list(bench.plain_loop(slide, tiles))), list(bench.read_patches(slide, tiles))
        np.testing.assert_array_equal(plain, np.concatenate(ours))


@pytest.mark.slow
def test_stages_of_a_network_are_timed_too(bench, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    bench.make_slides(tmp_path, 1, 1024)
    rates = bench.time_stages(tmp_path / "S0.tiff", [bench.make_vit(tmp_path / "vit", 1)], 0.5)
    assert set(rates) == {"tissue", "OpenSlide loop", "read", "encode: hf", "write"} and min(rates.values()) > 0


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    sizes = ["--slides=1", "--edge=1280", "--layers=0", "--huge=16384", "--tissue=8192"]
    command = [sys.executable, ROOT / "benchmarks/prepare.py", *sizes, "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for case in ("at 20x", "at 40x"):
        assert set(found["speed"][case]["alone"]) == {
            "tissue", "OpenSlide loop", "read", "encode: stain_texture", "write",
        }  # fmt: skip
        for row in found["speed"][case]["pipeline"].values():
            assert row["patches_per_s"] > 0 and sum(row["shares"].values()) == pytest.approx(1)
        assert "stain_texture, 1 cores, 1 workers" in found["speed"][case]["pipeline"]
    assert found["memory"]["patches"] == 1024 and 0 < found["memory"]["peak_gb"] < 2


@pytest.mark.slow
def test_a_slide_of_100000_pixels_is_prepared_under_2_gb(bench, tmp_path):
    """A worker's job and the shard that comes of it, in one process; its peak is what the kernel says of it.

    Its own (VmHWM): what `wait4` tells begins at the size of the process that started it.
    """
    slide, shard = tmp_path / "huge.tiff", tmp_path / "pathflip-00000.tfrecord"
    bench.write_huge_slide(slide, 100_000, 8192)
    lines = ["import sys", "from pathlib import Path", "from data_prep.jobs import Job, prepare_slide"]
    lines += ["from data_prep.shards import assemble", "slide, shard, part = map(Path, sys.argv[1:])"]
    lines += ["settings = {'encoder': 'stain_texture', 'half': False, 'patch_size': 256, 'mpp': 0.5}"]
    lines += ["settings |= {'assume_mpp': None, 'min_tissue': 0.25, 'cut': 'grid', 'edge_um': 2048.0}"]
    lines += ["job = Job('huge', '', slide, shard, part, settings)"]
    lines += ["assert not prepare_slide(job).error and assemble([job], None).done == ['huge']"]
    lines += ["print(Path('/proc/self/status').read_text())"]
    command = [sys.executable, "-c", "\n".join(lines), slide, shard, tmp_path / "part.tfrecord"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (info,) = Records([shard]).slides
    assert (info.num_patches, info.width) == (1024, 100_000)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024
    assert 1e8 < peak < 2e9
