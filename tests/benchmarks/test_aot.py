"""Prediction of a pod: HLO parsing, formula, extrapolation, largest batch, and one real compilation."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "aot.py"

# A gradient summed in one piece; another that a TPU sends in three steps while it computes; a gather in a loop of
# five iterations; a reduction of which each device keeps a part.
PROGRAM = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%send (p: f32[64,8]) -> (f32[64,8], u32[]) {
  %p = f32[64,8]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x','y'}
  ROOT %begun = (f32[64,8]{1,0}, u32[]) custom-call(%p, %all-reduce.1), custom_call_target="AsyncCollectiveStart"
}

%compute (p: f32[64,8], q: bf16[4]) -> (bf16[4], f32[64,8]) {
  %p.1 = f32[64,8]{1,0} parameter(0)
  %q = bf16[4]{0} parameter(1)
  %all-reduce.2 = f32[64,8]{1,0} all-reduce(%p.1), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x','y'}
  ROOT %both = (bf16[4]{0}, f32[64,8]{1,0}) tuple(%q, %all-reduce.2)
}

%receive (p: f32[64,8]) -> f32[64,8] {
  %p.2 = f32[64,8]{1,0} parameter(0)
  %all-reduce.3 = f32[64,8]{1,0} all-reduce(%p.2), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x','y'}
  ROOT %ended = f32[64,8]{1,0} custom-call(%all-reduce.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.2 (p: f32[16]) -> f32[2] {
  %p.3 = f32[16]{0} parameter(0)
  %all-reduce.4 = f32[16]{0} all-reduce(%p.3), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %kept = f32[2]{0} dynamic-slice(%all-reduce.4), dynamic_slice_sizes={2}
}

%body (s: (s32[], bf16[3])) -> (s32[], bf16[3]) {
  %s = (s32[], bf16[3]{0}) parameter(0)
  %part = bf16[3]{0} get-tuple-element(%s), index=1
  %work = bf16[3]{0} fusion(%part), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"10"}
  %all-gather.1 = bf16[6]{0} all-gather(%work), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %next = (s32[], bf16[3]{0}) tuple(%part, %part)
}

ENTRY %main (x: f32[64,8], y: bf16[4], z: f32[16]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %z = f32[16]{0} parameter(2)
  %all-reduce.5 = (f32[64,8]{1,0}, /*index=1*/f32[16]{0}) all-reduce(%x, %z), channel_id=1, replica_groups={}
  %async-collective-start = (f32[64,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%send
  %between = (bf16[4]{0}, f32[64,8]{1,0}) fusion(%x, %y), calls=%compute, backend_config={"estimated_cycles":"600"}
  %async-collective-done = f32[64,8]{1,0} fusion(%x), kind=kCustom, calls=%receive
  %alone = bf16[4]{0} fusion(%y), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"350"}
  %scattered = f32[2]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.2
  %loop = (s32[], bf16[3]{0}) while(%y), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[64,8]{1,0} copy(%async-collective-done)
}
"""


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("aot")


@pytest.fixture(scope="module")
def traffic(benchmark_modules):
    return benchmark_modules("traffic")


def test_collectives_of_every_form_are_read_once(traffic):
    found = traffic.read_traffic(PROGRAM, 8).collectives
    assert {(x.kind, x.bytes, x.devices, x.runs, x.overlaps, x.hidden_cycles) for x in found} == {
        ("all-reduce", 4 * (64 * 8 + 16), 8, 1, False, 0),
        ("all-reduce", 4 * 64 * 8, 8, 1, True, 600),
        ("reduce-scatter", 4 * 16, 8, 1, False, 0),
        ("all-gather", 2 * 3, 2, 5, False, 0),
    }


def test_bytes_on_the_wire_are_those_of_rings(traffic):
    # 2 * 7/8 of 2,112 and of 2,048 bytes, 7/8 of 64, five times the neighbour's 6.
    assert traffic.read_traffic(PROGRAM, 8).wire_bytes == 3696 + 3584 + 56 + 30
    one = traffic.Collective("all-to-all", 80, 8, 1, False, 0, ("f32",), "")
    assert one.wire_bytes == 70
    assert one._replace(kind="collective-permute").wire_bytes == 80


def test_compute_between_the_ends_hides_and_only_once(traffic):
    found = traffic.read_traffic(PROGRAM, 8)
    assert found.cycles == 600 + 350 + 5 * 10
    # Of 10 seconds of compute 6 lie between the ends: at 100 bytes/s they hide 600 of 3,584 bytes.
    assert found.waited_bytes(10, 100) == found.wire_bytes - 600
    assert found.waited_bytes(10, 1e6) == found.wire_bytes - 3584 == found.synchronous_bytes
    # A gather that spans the same compute is not hidden, because that compute already hides another.
    begin = "  %g-start = (f32[16]{0}, f32[128]{0}) all-gather-start(%z), channel_id=11, replica_groups={}\n"
    end = "  %g-done = f32[128]{0} all-gather-done(%g-start)\n"
    twice = PROGRAM.replace("  %between =", begin + "  %between =").replace("  %alone =", end + "  %alone =")
    found = traffic.read_traffic(twice, 8).collectives
    assert [x.hidden_cycles for x in found] == [0, 600, 0, 0, 0]
    assert [x.overlaps for x in found] == [False, True, True, False, False]


def test_a_pair_of_start_and_done_is_one_collective(traffic):
    program = """
ENTRY %main (z: bf16[16]) -> bf16[128] {
  %z = bf16[16]{0} parameter(0)
  %start = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%z), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %work = f32[4]{0} fusion(%z), calls=%x, backend_config={"estimated_cycles":"5"}
  ROOT %done = bf16[128]{0} all-gather-done(%start)
}
"""
    (found,) = traffic.read_traffic(program, 8).collectives
    assert (found.kind, found.wire_bytes, found.hidden_cycles, found.dtypes) == ("all-gather", 7 * 32, 5, ("bf16",))


def test_a_loop_that_may_run_any_number_of_times_is_refused(traffic):
    with pytest.raises(ValueError, match="loop: a loop with collectives"):
        traffic.read_traffic(PROGRAM.replace('"known_trip_count":{"n":"5"}', ""), 8)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        traffic.read_traffic("module @jit_step {}", 8)


def test_a_collective_that_goes_on_in_a_loop_is_one(traffic):
    """It is sent before the loop and received after it; the compute of all iterations of the loop hides it."""
    program = """
%send (p: f32[64,8]) -> (f32[64,8], u32[]) {
  %p = f32[64,8]{1,0} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p), channel_id=27, replica_groups={}
  ROOT %begun = (f32[64,8]{1,0}, u32[]) custom-call(%p, %all-reduce.1), custom_call_target="AsyncCollectiveStart"
}

%more (s: s32[]) -> bool[] {
  %s.1 = s32[] parameter(0)
  %most = s32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%s.1, %most), direction=LT
}

%body (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  ROOT %work = s32[] fusion(%s), calls=%send, backend_config={"estimated_cycles":"10"}
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %start = (f32[64,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%send
  %loop = s32[] while(%x), condition=%more, body=%body
  ROOT %done = f32[64,8]{1,0} fusion(%x), kind=kCustom, calls=%send
}
"""
    found = traffic.read_traffic(program, 8)
    assert [(x.runs, x.bytes, x.hidden_cycles) for x in found.collectives] == [(1, 2048, 80)] and found.cycles == 80
    alone = program.replace("  %start = (f32[64,8]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%send\n", "")
    assert {x.runs for x in traffic.read_traffic(alone, 8).collectives} == {1, 8}


def test_the_formula(bench):
    # 80 ms of compute; 1.6 GB at 200 GB/s are 8 ms, 2 ms of them with no compute beside, 3 ms not hidden by it.
    found = bench.Compiled(12, 16, 0, 0, 0, 1.6e9, 0.4e9, 0.6e9, 0, 0)
    assert bench.predict(0.080, found, 200e9) == pytest.approx((80 / 88, 80 / 82, 80 / 83))
    assert bench.predict(0.080, found._replace(wire_bytes=0, synchronous_bytes=0, waited_bytes=0), 1) == (1, 1, 1)


def test_bytes_go_on_in_a_straight_line(bench):
    few = bench.Compiled(2, 16, 1000, 500, 3, 60, 30, 20, 1e6, 40.0)
    found = few.extrapolate(bench.Compiled(4, 16, 1300, 600, 5, 80, 31, 20, 3e6, 50.0), 12)
    assert found == bench.Compiled(12, 16, 2500, 1000, 13, 160, 35, 20, 11e6, 90.0)
    assert found.fixed_bytes == 4013


def test_the_largest_batch_fits_and_the_next_does_not(bench):
    peak, fixed, slides, limit = 10e9, 4e9, 16, 16e9
    assert bench.largest_batch(peak, fixed, slides, limit, 8) == 32
    assert bench.largest_batch(peak, fixed, slides, limit - 1, 8) == 24
    assert bench.largest_batch(peak, fixed, slides, fixed, 8) == 0


def test_useful_flops_grow_with_slides_and_layers(bench):
    from pathflip_jax.training import settings

    config = settings.freeze(settings.load_config("align_large"))
    one = bench.step_flops(config, 12, 1)
    assert 450e9 < one < 600e9  # 480 GFLOP a slide in ROOFLINE.md
    assert bench.step_flops(config, 12, 16) == pytest.approx(16 * one)
    pairs = [bench.step_flops(config, n, 1) for n in (2, 4, 6)]
    assert pairs[2] - pairs[1] == pytest.approx(pairs[1] - pairs[0])


def test_results_of_other_topologies_are_kept_and_plotted(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    for name, devices in (("v5e:2x4", 8), ("v5e:8x8", 64)):
        found = {"devices": devices, "efficiency": {"exposed": 0.9, "overlapped": 0.97}}
        monkeypatch.setattr(bench, "run", lambda options, found=found: found)
        monkeypatch.setattr(sys, "argv", ["aot.py", "--topology", name, "--json", str(out), "--hlo", "x"])
        monkeypatch.setattr(bench, "ENVIRONMENT", {})
        assert bench.main() == 0
    monkeypatch.setattr(sys, "argv", ["aot.py", "--json", str(out), "--plot", str(tmp_path / "p" / "out.png")])
    assert bench.main() == 0
    assert set(json.loads(out.read_text())["results"]) == {"v5e:2x4", "v5e:8x8"}
    assert (tmp_path / "p" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_other_numbers_of_chips_lie_on_the_line(bench):
    chips = np.array([1, 8, 64, 256])
    for grows in (0, 1e-4):
        found = 1 / (1 + 0.1 * (chips - 1) / chips + grows * (chips - 1))
        assert bench.interpolate(chips[1:3], found[1:3], chips) == pytest.approx(found)
    assert bench.interpolate(chips[3:], found[3:], chips)[[0, 3]] == pytest.approx([1, found[3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "expected a chip with known rates: v5e, v6e"),
        (["--topology=v5e:2x4", "--fit", "2"], "expected two numbers of layers"),
        (["--plot=out.png"], "by --json"),
    ],
)
def test_what_cannot_be_predicted_is_said(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["aot.py", *arguments])
    monkeypatch.setattr(bench, "ENVIRONMENT", {})
    assert bench.main() in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra [aot]")
def test_eight_chips_of_v5e(tmp_path):
    """The real step of align_large, one layer of it: summed in float32, most of it while the chips compute.

    Its texts lie in rows of one length, for each length is compiled by itself.
    """
    out, smaller = tmp_path / "out.json", ["--config.model.layers=1", "--config.data.row_step=384"]
    command = [sys.executable, SCRIPT, "--topology=v5e:2x4", f"--json={out}", "--"]
    done = subprocess.run([*command, *smaller], capture_output=True, text=True, timeout=1500, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    summary = r"peak_bytes=(\d+) largest_batch=(\d+) efficiency_exposed=([\d.]+)% efficiency_overlapped=([\d.]+)%"
    peak, batch, exposed, overlapped = (float(x) for x in re.fullmatch(summary, done.stdout.splitlines()[-1]).groups())
    whole = json.loads(out.read_text())["results"][" ".join(["v5e:2x4", *smaller])]["whole"]
    assert 4 * whole["parameter_bytes"] < peak < 15.75 * 2**30 and batch % 64 == 0 and batch >= 128
    # Every gradient in float32, round a ring of eight: 7/4 of the bytes of all parameters, and a little for embeddings.
    gradients = 7 / 4 * whole["parameter_bytes"]
    assert gradients < whole["wire_bytes"] < 1.05 * gradients
    assert 50 < exposed < overlapped < 100
