"""`pathflip doctor` names each fault with its cure, and its exit code shows whether there is one."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from pathflip_jax import cli
from pathflip_jax.commands import checks, findings
from pathflip_jax.runtime import ulimits


def _by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


def test_machine_is_described():
    findings = _by_name(checks.examine())
    assert findings["jax"].state == "ok" and findings["devices"].state == "ok"
    assert "GB" in findings["memory"].found and "GB" in findings["disk"].found
    assert findings["file reader"].state == "ok"


def test_few_open_files_and_little_shared_memory_are_noted(monkeypatch):
    monkeypatch.setattr(ulimits, "open_files", lambda: 64)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20, free=1 << 40))
    noted = {finding.name: finding.cure for finding in checks._room() if finding.state == "note"}
    assert "ulimit -n" in noted["open files"]
    assert "--shm-size" in noted.get("shared memory", "--shm-size")  # macOS has none


def test_a_device_without_a_known_peak_is_noted(monkeypatch):
    for kind, state in (("NVIDIA H200", "ok"), ("NVIDIA H100 NVL", "note")):
        devices = [SimpleNamespace(platform="gpu", device_kind=kind)]
        monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
        found = _by_name(checks.examine())["utilisation"]
        assert found.state == state and kind in found.found


def test_a_folder_of_a_packages_name_is_found(tmp_path, monkeypatch):
    """Folders such as W&B leaves behind shadow a package, with or without PYTHONPATH=., and have no metadata."""
    (tmp_path / "absentpackage").mkdir()
    (tmp_path / "h5py").mkdir()
    (tmp_path / "h5py" / "__init__.py").touch()
    (tmp_path / "tokenizers").mkdir()  # without an __init__.py the package takes precedence
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("h5py", "tokenizers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(
        checks, "EXTRAS", {"absent": ("absentpackage", "absentpackage", "try"), "no": ("n0", "n0", "x")}
    )
    found = _by_name(checks.examine())
    assert found["h5py"].state == "fault" and str(tmp_path / "h5py" / "__init__.py") in found["h5py"].found
    assert "rename" in found["h5py"].cure and found["tokenizers"].state == "ok"
    assert found["extra [absent]"].state == "note" and str(tmp_path / "absentpackage") in found["extra [absent]"].found
    assert "pip install" in found["extra [absent]"].cure and "PYTHONPATH" in found["extra [absent]"].cure
    assert found["extra [no]"][1:3] == ("not installed", "note")


@pytest.mark.parametrize("error", [RuntimeError("boom\nand more"), SystemExit(3), KeyError()])
def test_a_check_that_breaks_is_a_fault_and_the_others_go_on(error, monkeypatch, capsys):
    def broken():
        yield findings.Finding("devices", "half of it", "ok")
        raise error

    monkeypatch.setattr(checks, "_devices", broken)
    assert cli.main(["doctor", "--json"]) == cli.WRONG_INPUT
    rows = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in rows]
    assert names.count("devices") == 2 and {"python", "launcher", "memory", "offline"} <= set(names)
    (fault,) = [row for row in rows if row["state"] == "fault"]
    assert fault["found"].startswith(type(error).__name__) and "\n" not in fault["found"] and fault["cure"]


def test_launch_scripts_that_can_run_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _by_name(checks.examine())["launch scripts"].state == "note"
    for program in checks.LAUNCHERS:
        (tmp_path / program).touch(0o755)
    found = _by_name(checks.examine())["launch scripts"]
    folder = Path(__file__).resolve().parents[2] / "launch"
    assert found.state == "ok" and found.found.count("launch/") == 5
    assert all((folder / script).is_file() for script in checks.LAUNCHERS.values())


def test_the_launcher_is_named(monkeypatch):
    assert _by_name(checks.examine())["launcher"].found == "none: one process trains alone"
    for name, value in {"COORDINATOR_ADDRESS": "first:1", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    found = _by_name(checks.examine())["launcher"]
    assert found == ("launcher", "process 3 of 4, found by JAX_COORDINATOR_ADDRESS", "ok", "")
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert _by_name(checks.examine())["launcher"].state == "fault"


def test_every_fault_or_note_has_a_cure(tmp_path):
    findings = checks.examine(records=tmp_path, texts=tmp_path / "absent.jsonl", configs=["no_such_config"])
    for finding in findings:
        assert finding.state in ("ok", "note", "fault")
        if finding.state == "note":
            assert finding.cure
    faults = {finding.name for finding in findings if finding.state == "fault"}
    assert faults == {"records", "texts", "config no_such_config"}


def test_bundled_configs_are_sound():
    for name in ("align_base", "align_large", "demo"):
        finding = _by_name(checks.examine(configs=[name]))[f"config {name}"]
        assert finding.state == "ok", finding


def test_a_flipped_byte_is_found(tiny_cohort, capsys):
    records = tiny_cohort.copy_records()
    assert cli.main(["doctor", "--records", str(records), "--texts", str(tiny_cohort.texts)]) == 0
    shard = next(path for path in sorted(records.iterdir()) if "tfrecord" in path.name and path.suffix != ".idx")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["doctor", "--records", str(records), "--json"]) == cli.WRONG_INPUT
    faults = [row for row in json.loads(capsys.readouterr().out) if row["state"] == "fault"]
    assert len(faults) == 1 and shard.name in faults[0]["found"] and faults[0]["cure"]
