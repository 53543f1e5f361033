"""metrics.jsonl survives crashes and resumes without a step standing twice; the rest draws from it."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from pathflip_jax.monitoring.metrics import (
    METRICS,
    MetricsWriter,
    import_wandb,
    plot,
    read_metrics,
    truncate_metrics,
    try_to_plot,
)

MACHINE = {"perf/utilisation": 0.41, "perf/input_wait": 0.02, "perf/device_memory_bytes": 12.3e9}


def write(folder, first, last, **more):
    with MetricsWriter(folder, first - 1, last, slides_per_step=8, **more) as writer:
        for step in range(first, last + 1):
            values = {"loss": 1 / step, "loss_slide": 0.5 / step, "learning_rate": 1e-3, "gradient_norm": 2.0}
            writer.write(step, values | ({"val/recall_at_1": 0.5} if step % 2 == 0 else {}))


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    write(tmp_path, 1, 6)
    write(tmp_path, 5, 8)
    rows = read_metrics(tmp_path / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[5]["val/recall_at_1"] == 0.5 and rows[6]["loss"] == 1 / 7 and rows[6]["slides_per_second"] > 0


def test_a_line_cut_off_by_a_crash_is_dropped_and_a_foreign_one_named(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    for foreign in ("hello", "[1]", '{"step": "2"}', "[" * 100_000):
        path.write_text(f'{{"step": 1}}\n{foreign}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a row of metrics: '"):
            read_metrics(path)
    path.write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not UTF-8"):
        read_metrics(path)


def test_a_row_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path, 0, 2, slides_per_step=8) as writer:
        writer.write(1, {"loss": 1.0})
        assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [1]


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path / "run", 1, 2, primary=False)
    assert not (tmp_path / "run").exists()


def test_plots_and_events_are_there(tmp_path):
    write(tmp_path, 1, 4)
    pictures = {path.name for path in plot(tmp_path)}
    assert pictures == {"loss.png", "learning_rate.png", "validation.png", "gradient_norm.png", "speed.png"}
    assert all((tmp_path / "plots" / name).stat().st_size > 2000 for name in pictures)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert json.loads((tmp_path / METRICS).read_text().splitlines()[0])["loss"] == 1.0


def test_the_use_of_the_machine_is_shown_and_drawn(tmp_path, capsys):
    with MetricsWriter(tmp_path, 0, 2, slides_per_step=8) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0} | MACHINE)
        writer._bar.part.refresh()
    printed = capsys.readouterr().err
    assert "use=41.0%" in printed and "wait=2.0%" in printed and "GB=12.3" in printed
    assert {path.name for path in plot(tmp_path)} == {"loss.png", "speed.png", "utilisation.png", "memory.png"}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it was told."""
    told = SimpleNamespace(starts=[], rows=[], finished=0)

    def finish():
        told.finished += 1

    def init(**settings):
        told.starts.append(settings)
        return SimpleNamespace(log=lambda row, step: told.rows.append((step, row)), finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setattr(sys.modules["wandb"], "__path__", [str(tmp_path / "wandb")], raising=False)
    with pytest.raises(ImportError, match="wandb is imported instead: rename it"):
        import_wandb("slides")


def test_weights_and_biases_gets_every_row_and_one_run_goes_on_as_one(tmp_path, wandb):
    for first, last in ((1, 2), (3, 4)):
        write(tmp_path, first, last, wandb_project="slides", config={"train": {"seed": 3}})
    assert [step for step, _ in wandb.rows] == [1, 2, 3, 4] and wandb.finished == 2
    assert wandb.rows[3][1]["train/loss"] == 0.25 and wandb.rows[3][1]["val/recall_at_1"] == 0.5
    one, two = wandb.starts
    assert one == two and one["project"] == "slides" and one["resume"] == "allow" and one["id"]
    assert one["config"] == {"train": {"seed": 3}}


def test_nobody_else_reports_to_weights_and_biases(tmp_path, wandb):
    write(tmp_path, 1, 2)
    write(tmp_path / "other", 1, 2, wandb_project="slides", primary=False)
    assert not wandb.starts


def test_without_weights_and_biases_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"wandb_project='slides' needs wandb: .*pathflip-jax\[wandb\]"):
        write(tmp_path, 1, 2, wandb_project="slides")


def test_what_shows_the_rows_fails_without_the_run(tmp_path, wandb, monkeypatch, capsys):
    """TensorBoard that cannot write, Weights & Biases that is not reached, a terminal that is gone: each told once."""
    (tmp_path / "tensorboard").touch()

    def unreachable(**settings):
        raise RuntimeError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    write(tmp_path, 1, 3, wandb_project="slides")
    said = capsys.readouterr().err
    assert said.count("TensorBoard failed: ") == 1 and "'no network'" in said and said.count("training continues") == 2
    assert [row["step"] for row in read_metrics(tmp_path / METRICS)] == [1, 2, 3]


def test_what_fails_in_mid_run_is_told_once(tmp_path, wandb, monkeypatch, capsys):
    def gone(self, *_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    with MetricsWriter(tmp_path, 0, 3, slides_per_step=8, wandb_project="slides") as writer:
        writer.write(1, {"loss": 1.0})
        monkeypatch.setattr(type(writer._bar.part), "set_postfix", gone)
        monkeypatch.setattr(writer._wandb.part, "log", gone)
        monkeypatch.setattr(writer._events.part.file_writer.event_writer._worker, "is_alive", lambda: False)
        writer.write(2, {"loss": 1.0})
        writer.write(3, {"loss": 1.0})
        monkeypatch.undo()
    said = capsys.readouterr().err
    for name in ("TensorBoard", "Weights & Biases", "the progress bar"):
        assert said.count(f"{name} failed: ") == 1
    assert len(wandb.rows) == 1 and len(read_metrics(tmp_path / METRICS)) == 3
    writer._events.part.close()
    writer._bar.part.close()


def test_metrics_that_cannot_be_written_end_a_run(tmp_path):
    with pytest.raises(OSError, match=r"metrics\.jsonl: step 2 was not written .*full.*free disk space"):
        with MetricsWriter(tmp_path, 0, 3, slides_per_step=8) as writer:
            writer.write(1, {"loss": 1.0})
            writer._file.close()
            writer._file = SimpleNamespace(name=writer._file.name, write=full, flush=full)
            writer.write(2, {"loss": 1.0})


def full(*_):
    raise OSError(28, "the disk is full")


def test_pictures_that_cannot_be_drawn_end_no_run(tmp_path, capsys):
    write(tmp_path, 1, 2)
    (tmp_path / "plots").touch()
    try_to_plot(tmp_path)
    assert "plots: not drawn (FileExistsError" in capsys.readouterr().err
