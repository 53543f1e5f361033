"""The accelerator benchmark: it survives failing parts, resumes, and every part works at small sizes."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NEEDED = ("out of memory", "driver 510.1 does not fit", "process 77 holds the TPU", "package xprof is not installed")


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("accelerator")


@pytest.fixture(autouse=True)
def made_up_parts(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def part(bench, name, limit=60.0, **arguments):
    return bench.Part(name, f"made_up_parts:{name}", arguments, limit)


def parts(bench, **more):
    return {bench.DEVICE: part(bench, "device")} | more


def run(bench, out, again=False, **more):
    session = bench.Session(out, small=False)
    done = bench.run_parts(session, parts(bench, **more), again)
    return done, json.loads((out / "accelerator.json").read_text())


def is_alive(pid):
    """Whether a process is running; zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_part_that_fails_is_named_with_its_cure_and_the_others_run(bench, tmp_path, capsys):
    messages = {
        "memory": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.",
        "driver": "CUDA driver version is insufficient for CUDA runtime version",
        "busy": "The TPU is already in use by process with pid 77. Not attempting to load libtpu.so",
        "missing": "ModuleNotFoundError: No module named 'xprof'",
    }
    failing = {name: part(bench, "raises", message=text) for name, text in messages.items()}
    failing |= {"crash": part(bench, "crashes"), "fault": part(bench, "finds_a_fault"), "last": part(bench, "counts")}
    done, found = run(bench, tmp_path, **failing)
    assert not done and found["device"]["kind"] == "made up"
    states = {name: one["state"] for name, one in found["parts"].items()}
    assert states.pop("last") == states.pop("device") == "done" and set(states.values()) == {"failed"}
    for name, needed in zip(messages, NEEDED, strict=True):
        one = found["parts"][name]
        assert needed in one["fault"] and len(one["cure"]) > 20 and "\n" not in one["fault"]
        assert one["rows"] == [["before", {"n": 1}]]  # rows measured before the failure are kept
    assert "1.0 GiB" in found["parts"]["memory"]["fault"] and "123 bytes" in found["parts"]["memory"]["fault"]
    assert "525" in found["parts"]["driver"]["fault"] and "SIGABRT" in found["parts"]["crash"]["fault"]
    assert len(found["parts"]["fault"]["rows"]) == 2 and found["parts"]["fault"]["cure"] == "mend it"
    printed = capsys.readouterr().out
    assert all(
        re.search(rf"^{name} +failed.*{re.escape(found['parts'][name]['fault'])}", printed, re.M) for name in states
    )
    page = (tmp_path / "accelerator.html").read_text()
    assert "7 parts" not in page and "6 of 8 parts failed" in page and "http" not in page.split("</style>")[1]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1 and base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert found["machine"]["versions"]["jax"] and found["machine"]["revision"] and "510.1" in page


def test_a_part_that_hangs_is_ended_with_all_it_started(bench, tmp_path):
    done, found = run(bench, tmp_path, slow=part(bench, "hangs", limit=4.0), last=part(bench, "counts"))
    slow = found["parts"]["slow"]
    assert not done and found["parts"]["last"]["state"] == "done"
    assert "not done after 4 s; 1 rows" in slow["fault"] and "--part slow --limit" in slow["cure"]
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_session_goes_on_where_the_one_before_ended(bench, tmp_path, capsys):
    run(bench, tmp_path, first=part(bench, "counts"), second=part(bench, "raises", message="x"))
    done, found = run(bench, tmp_path, first=part(bench, "counts", upto=5), second=part(bench, "counts"))
    assert done and len(found["parts"]["first"]["rows"]) == 3 == len(found["parts"]["second"]["rows"])
    assert "first: done before" in capsys.readouterr().out
    _, found = run(bench, tmp_path, again=True, first=part(bench, "counts", upto=5))
    assert len(found["parts"]["first"]["rows"]) == 5 and "second" in found["parts"]


def test_results_of_another_device_are_not_mixed(bench, tmp_path):
    run(bench, tmp_path, first=part(bench, "counts"))
    other = {bench.DEVICE: part(bench, "device", kind="another")}
    before = (tmp_path / "accelerator.json").read_text()
    with pytest.raises(ValueError, match=r"accelerator.json: measured on .*made up.*another.*--out"):
        bench.run_parts(bench.Session(tmp_path, small=False), other)
    assert (tmp_path / "accelerator.json").read_text() == before
    assert bench.run_parts(bench.Session(tmp_path, small=False), other, again=True)
    assert list(json.loads((tmp_path / "accelerator.json").read_text())["parts"]) == ["device"]
    (tmp_path / "accelerator.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file of this command"):
        bench.Session(tmp_path, small=False)


def test_the_operations_of_every_kind_of_device_are_found_once(bench):
    from accelerator_parts.steps import device_events

    def line(pid, tid, name):
        return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}

    def event(pid, tid, name, **about):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": 1, "args": about}

    gpu = [line(1, 1, "Stream #14(Compute)"), line(1, 2, "XLA Ops"), event(1, 1, "kernel", hlo_op="fusion.1"),
           event(1, 1, "memcpy"), event(1, 2, "fusion.1", hlo_op="fusion.1")]  # fmt: skip
    tpu = [line(2, 1, "XLA Ops"), line(2, 2, "Steps"), event(2, 1, "fusion.2"), event(2, 2, "0")]
    cpu = [line(3, 1, "tf_XLAEigen"), event(3, 1, "dot", hlo_op="dot.3"), event(3, 1, "a call")]
    found = [one["args"]["hlo_op"] for one in device_events(gpu + tpu + cpu)]
    assert found == ["fusion.1", "memcpy", "fusion.2", "dot.3"]


def test_a_gpu_that_jax_does_not_use_is_a_fault_of_the_device(bench, tmp_path, monkeypatch):
    from accelerator_parts import device

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H100 PCIe, 510.47.03, 81559 MiB, 0 MiB\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "_torch", lambda: "not installed")
    ((table, found),) = device.run(bench.Context(False, tmp_path, 1.0))
    assert table == "device" and found["platform"] == "cpu" and found["driver"] == "510.47.03"
    assert "a GPU is present (NVIDIA H100 PCIe" in found["fault"] and "pathflip-jax[gpu]" in found["cure"]


def test_pytorch_that_does_not_see_the_device_is_named(bench, tmp_path):
    from accelerator_parts.beside import why_not_compared

    def told(**device):
        return why_not_compared(bench.Context(False, tmp_path, 1.0, device))

    assert told(platform="gpu", torch="2.13.0 NVIDIA H100") is None
    assert "torch (2.13.0+cpu cpu) does not see NVIDIA H100" in told(
        platform="gpu", kind="NVIDIA H100", torch="2.13.0+cpu cpu")["note"]  # fmt: skip
    assert "TPU" in told(platform="tpu", torch="2.13.0+cpu cpu")["note"]
    assert "not installed" in told(platform="cpu", torch="not installed")["note"]


def test_a_checkpoint_of_a_newer_orbax_is_named(bench, tmp_path):
    from accelerator_parts.runs import of_newer_orbax

    golden = BENCHMARKS.parent / "tests" / "golden" / "runs" / "0.1.0" / "pathflip" / "checkpoints" / "2"
    assert of_newer_orbax(golden) is None and of_newer_orbax(tmp_path) is None
    about = json.loads((golden / "_CHECKPOINT_METADATA").read_text())
    about["item_handlers"]["params"] = "orbax.checkpoint.v9.Handler"
    (tmp_path / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    found = of_newer_orbax(tmp_path)
    assert re.search(r"newer Orbax; orbax-checkpoint [\d.]+ has no orbax.checkpoint.v9.Handler", found["fault"])
    assert "--upgrade" in found["cure"]


def test_memory_that_was_not_planned_is_a_fault(bench):
    from accelerator_parts.memory import judge

    assert "fault" not in judge(100, 101, "gpu") and "fault" not in judge(100, 300, "cpu")
    assert "fault" in judge(100, 110, "gpu") and "fault" in judge(100, 40, "gpu")


def test_a_folder_without_wheels_is_refused_with_the_command_that_makes_one(tmp_path):
    script = BENCHMARKS / "accelerator.sh"
    done = subprocess.run([script, "--wheels", tmp_path / "none", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "no wheel of pip" in done.stderr and "--download" in done.stderr
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: benchmarks/accelerator.sh --download DIR" in done.stderr
    if checker := shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck"):
        assert subprocess.run([checker, script], capture_output=True, text=True).stdout == ""


@pytest.mark.slow
def test_every_part_works_at_small_sizes(bench, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--out", str(tmp_path), "--small"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    found = json.loads((tmp_path / "accelerator.json").read_text())
    faults = {name: one["fault"] for name, one in found["parts"].items() if "fault" in one}
    assert done.returncode == 0 and not faults, (faults, done.stdout)
    assert list(found["parts"]) == list(bench.PARTS) and found["small"] and found["device"]["platform"] == "cpu"
    rows = {name: one["rows"] for name, one in found["parts"].items()}
    assert all(rows.values())
    assert sum(table.startswith("longest operations") for table, _ in rows["step-pathflip"]) == 12
    assert rows["deterministic"][0][1]["arrays that differ"] == 0 < rows["deterministic"][0][1]["arrays"]
    assert rows["resume"][-1][1]["arrays that differ"] == 0
    assert {table for table, _ in rows["beside-pathflip"]} == {"agreement", "beside PyTorch, float32"}
