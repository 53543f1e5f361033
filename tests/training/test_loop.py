"""Whole runs on a tiny cohort: stopped, killed and damaged runs end as the undisturbed one, bit for bit."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from pathflip_jax.data.storage import json_files
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.model.parameters import flatten
from pathflip_jax.monitoring import goodput
from pathflip_jax.monitoring.metrics import MetricsWriter, read_metrics
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.runs import lock as run_lock
from pathflip_jax.runs.checkpoints import stored_arrays
from pathflip_jax.runs.folder import load_run
from pathflip_jax.training import alignment as alignment_stage
from pathflip_jax.training import loop, settings
from pathflip_jax.training.objectives import alignment

SMALL = [
    "--config.train.batch_size=4", "--config.data.regions=2", "--config.data.patch_slots=4", "--config.model.hidden=16",
    "--config.model.layers=1", "--config.model.embed_dim=16",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The runs here share their compiled steps, as restarted runs do with a compilation cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.5)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="module")
def options(tiny_cohort):
    """A run of 4 steps that validates and saves after 2 and 4."""
    return ["--config", "demo:smoke", *tiny_cohort.settings(), *SMALL]


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """The undisturbed run."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert loop.main([*options, "--workdir", str(workdir)]) == 0
    return workdir


def arrays(workdir, step):
    """Every number of a checkpoint as bytes."""
    stored = stored_arrays(workdir / "checkpoints" / str(step))
    return {f"{item}/{name}": np.asarray(x).tobytes() for item, tree in stored.items() for name, x in tree.items()}


def metrics(workdir):
    """The rows without what depends on the clock."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if "perf/" not in name and "per_second" not in name} for row in rows]


def assert_same_run(found, expected):
    assert metrics(found) == metrics(expected)
    mine, theirs = arrays(found, 4), arrays(expected, 4)
    assert mine.keys() == theirs.keys() and len(theirs) > 100
    assert [name for name in theirs if mine[name] != theirs[name]] == []
    assert os.listdir(found / "best") == os.listdir(expected / "best")


def test_a_run_leaves_all_that_later_steps_need(straight, tiny_cohort):
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)
    assert [row["step"] for row in rows if "val/mean_reciprocal_rank" in row] == [2, 4]
    assert all(0 <= rows[3][f"val/{name}"] <= 1 for name in ("recall_at_1", "recall_at_5", "mean_reciprocal_rank"))
    candidates = rows[3]["val/recall_at_1_chance"]
    assert 0 < candidates < rows[3]["val/recall_at_5_chance"] <= 1
    assert rows[3]["val/loss_chance"] > rows[3]["val/loss_slide_chance"] > 0
    model, config, tokenizer = load_run(straight)
    assert config["data"]["encoder"] == "tiny" and config["data"]["edge_um"] == 64.0 and config["train"]["steps"] == 4
    assert model.config.feature_dim == 16 and model.config.vocab_size == tokenizer.vocab_size
    about = json.loads((straight / "checkpoints/4/about/metadata").read_text())
    manifest = json.loads((tiny_cohort.records / "manifest.json").read_text())
    assert about["config"]["data"]["hashes"]["records"] == manifest["sha256"] and about["git"]
    first, last = (rows[step - 1]["val/mean_reciprocal_rank"] for step in (2, 4))
    chosen, value = (4, last) if last >= first - config["train"]["select_margin"] else (2, first)
    assert about["best"] == {"step": chosen, "value": value, "top": max(first, last)}
    assert os.listdir(straight / "best") == [str(chosen)]
    assert len(list((straight / "plots").glob("*.png"))) == 7 and list((straight / "tensorboard").iterdir())


def test_every_step_says_how_the_machine_was_used(straight):
    rows = read_metrics(straight / "metrics.jsonl")
    for row in rows:
        assert (
            row["perf/step_seconds"] > 0 and row["perf/useful_flops"] > 1e6 and row["perf/process_memory_bytes"] > 1e7
        )
        assert row["perf/utilisation"] > 0 and 0 <= row["perf/input_wait"] < 1
    compiled = [row["perf/compilations"] for row in rows]  # the first validation and save need programs, then no more
    assert compiled[0] == 0 < compiled[1] <= compiled[2] == compiled[3]
    found = goodput.summarise(straight)
    assert found.steps == 4 and found.starts == 1 and found.saves >= 2 and found.badput["lost_work"] == 0
    assert found.total == pytest.approx(found.productive + sum(found.badput.values()))
    assert all(found.badput[cause] > 0 for cause in ("initialisation", "compilation", "evaluation", "checkpoint_save"))


def test_what_an_operator_asks_for_changes_no_number(options, straight, tmp_path, capsys):
    """A profile, determinism, other checkpoints kept and saved: and a run goes on with them."""
    workdir = tmp_path / "run"
    command = [*options, "--workdir", str(workdir), "--config.train.deterministic=True", "--config.train.keep_every=1"]
    assert loop.main([*command, "--profile=2:3", "--config.train.preemptions_per_day=9"]) == 0
    assert_same_run(workdir, straight)
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    printed = capsys.readouterr().err
    assert "profile of steps 2 to 3" in printed and "at 9 preemptions per day, --config.train.save_every=" in printed
    (workdir / "metrics.jsonl").unlink()  # a run that is done stays done, whatever became of its logs
    (workdir / "goodput.jsonl").write_text("[]")
    assert loop.main([*options, "--workdir", str(workdir), "--config.train.save_every=1"]) == 0
    with pytest.raises(ValueError, match="--profile=x: expected a count"):
        loop.main([*command, "--profile=x"])


def test_a_run_on_urls_is_the_run_on_paths(options, straight, tiny_cohort, tmp_path):
    """Records, reports, slide table and vocabulary in a bucket, that of this process."""
    bucket, urls = fsspec.filesystem("memory"), []
    for name in ("records", "texts", "slides", "vocabulary"):
        place = getattr(tiny_cohort, name)
        bucket.put(str(place), f"/train/{place.name}", recursive=True)
        urls.append(f"--config.data.{name.replace('vocabulary', 'tokenizer')}=memory://train/{place.name}")
    assert loop.main([*options, *urls, "--workdir", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", straight)


def test_checkpoints_elsewhere_outlive_the_machine(options, straight, tmp_path, monkeypatch, capsys):
    kept, first, second = (tmp_path / name for name in ("kept", "first", "second"))
    command = [*options, f"--config.train.checkpoints={kept}", "--workdir"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step == 2)
        assert loop.main([*command, str(first)]) == loop.TRY_AGAIN
    shutil.rmtree(first)  # the machine was lost
    assert loop.main([*command, str(second)]) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    mine, theirs = arrays(kept, 4), arrays(straight, 4)
    assert mine == theirs and os.listdir(kept / "best") == os.listdir(straight / "best")
    assert metrics(second) == metrics(straight)[2:] and not (second / "checkpoints").exists()
    for place in (kept, second):
        found, expected = flatten(load_run(place)[0]), flatten(load_run(straight)[0])
        assert all((found[name] == expected[name]).all() for name in expected)
    with pytest.raises(ValueError, match=f"{second} has the logs of a run with checkpoints in {kept}, not in {second}"):
        loop.main([*options, "--workdir", str(second)])


def test_a_run_that_ends_between_its_checkpoints_goes_on_from_a_local_one(
    options, straight, tmp_path, monkeypatch, capsys
):
    command = [*options, f"--config.train.local_checkpoints={tmp_path / 'ram'}", "--config.train.local_every=1"]
    command += ["--workdir", str(tmp_path / "run")]
    save = loop.Checkpoints.save

    def lost(self, step, *arguments):
        if step == 4:
            raise ConnectionError("the machine was lost")
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", lost)
        with pytest.raises(ConnectionError, match="the machine was lost"):
            loop.main(command)
    assert loop.main(command) == 0
    assert "resuming from step 3" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", straight)


def test_urls_that_a_run_cannot_write_to(options, tmp_path):
    with pytest.raises(ValueError, match="--workdir=gs://b/run: logs .*--config.train.checkpoints=gs://b/run"):
        loop.main([*options, "--workdir", "gs://b/run"])
    with pytest.raises(ValueError, match="s3://b/run: .*a gs:// URL; Orbax writes checkpoints nowhere else"):
        loop.main([*options, "--config.train.checkpoints=s3://b/run", "--workdir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--config.model.bert=gs://b/bert: weights can only be read from a local disk"):
        loop.main([*options, "--config.model.bert=gs://b/bert", "--workdir", str(tmp_path / "run")])


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(options, straight, tmp_path, monkeypatch, capsys):
    def write_and_stop(self, step, values, write=MetricsWriter.write):
        write(self, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    command = [*options, "--workdir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write_and_stop)
        assert loop.main(command) == loop.TRY_AGAIN == 75
    assert "stopped at step 2 of 4" in capsys.readouterr().err
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert loop.main(command) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", straight)
    found = goodput.summarise(tmp_path / "run")
    assert (found.starts, found.steps, found.badput["lost_work"]) == (2, 4, 0) and found.badput["down"] > 0


def test_a_run_with_augmentation_and_an_average_of_weights_resumes_bit_for_bit(options, tmp_path, monkeypatch):
    """The checkpoint holds the average, which inference loads, and beside it the weights that training goes on from."""
    command = [*options, "--config.optim.weight_average=0.9", "--config.data.feature_dropout=0.2"]
    command += ["--config.data.standardise=True"]
    command += [
        "--config.data.feature_noise=0.1",
        "--config.loss.soft_targets=0.2",
        "--config.loss.region_pooling=cosine",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.main([*command, "--workdir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "requested", lambda self, step: step == 2)
        assert loop.main([*command, "--workdir", str(parts)]) == loop.TRY_AGAIN
    assert loop.main([*command, "--workdir", str(parts)]) == 0
    assert_same_run(parts, whole)
    stored = stored_arrays(whole / "checkpoints" / "4")
    loaded = flatten(load_run(whole, "latest")[0])
    name = "slide_projection/kernel"
    assert np.array_equal(loaded[name], stored["params"][name])
    (trained,) = (x for key, x in stored["opt_state"].items() if key.endswith(name) and "weights" in key)
    assert trained.shape == loaded[name].shape and not np.array_equal(trained, loaded[name])


def test_a_closed_terminal_stops_a_run_as_sigterm_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with loop.StopSignal() as stop:
            assert not stop.requested(1)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
        with loop.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", ["", "device"])
def test_where_features_lie_changes_nothing_and_the_step_is_compiled_once(
    options, straight, tmp_path, tiny_cohort, where, capsys
):
    """Four steps are several epochs of this cohort: other slides, other texts, the same program."""
    assert loop.main([*options, f"--config.data.resident={where}", "--workdir", str(tmp_path / "run")]) == 0
    assert "the training step was compiled once" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", straight)


# Orbax leaves coroutines behind when a file is damaged.
@pytest.mark.filterwarnings("ignore:.*coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(options, straight, tmp_path, capsys):
    workdir = Path(shutil.copytree(straight, tmp_path / "run"))
    for path in (workdir / "checkpoints/4/opt_state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert loop.main([*options, "--workdir", str(workdir)]) == 0
    gc.collect()
    assert "going back to step 2" in capsys.readouterr().out
    assert_same_run(workdir, straight)


def test_another_config_in_the_same_workdir_is_refused(options, straight, tmp_path, tiny_cohort):
    with pytest.raises(ValueError, match="(?s)holds a run with other settings.*train.seed: 0 in the run, 3 now"):
        loop.main([*options, "--workdir", str(straight), "--config.train.seed=3"])
    changed = tmp_path / "reports.jsonl"
    changed.write_text(tiny_cohort.texts.read_text().replace("extensive", "focal"))
    with pytest.raises(ValueError, match="data.hashes.texts"):
        loop.main([*options, "--workdir", str(straight), f"--config.data.texts={changed}"])
    assert metrics(straight)[-1]["step"] == 4


def test_two_runs_in_one_folder_are_refused_and_one_that_still_saves_is_a_reason_to_start_again(
    options, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "open_training", pytest.fail)
    for more in ("--workdir", "--config.train.checkpoints"):
        command = [*options, "--workdir", str(tmp_path / "other"), f"{more}={tmp_path / 'run'}"]
        with run_lock.hold([tmp_path / "run"], lambda: False):
            with pytest.raises(
                run_lock.InUseError, match=f"{tmp_path / 'run'}: process {os.getpid()} .*is running there"
            ):
                loop.main(command)
            lock = tmp_path / "run" / run_lock.LOCK
            lock.write_text(lock.read_text().replace('"ending": false', '"ending": true'))
            monkeypatch.setattr(run_lock, "ENDING_SECONDS", 0)
            assert loop.main(command) == loop.TRY_AGAIN
    assert "is still saving; start again" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_batch_of_one_is_refused_before_it_is_compiled(options, tmp_path):
    with pytest.raises(ValueError, match="a batch of one slide has no negative"):
        loop.main([*options, "--config.train.batch_size=1", "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(options, tmp_path, monkeypatch):
    def broken(*_):
        return lambda params, frozen, opt_state, batch, number: (params, opt_state, {"loss": number * np.nan})

    monkeypatch.setattr(loop, "make_step", broken)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan.*learning_rate"):
        loop.main([*options, "--workdir", str(tmp_path / "run")])
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_frozen_parameter_stays_and_the_rest_learns(options, straight, tmp_path, monkeypatch):
    def half(*arguments):
        return alignment(*arguments)._replace(trainable=lambda name: not name.startswith("qformer/"))

    monkeypatch.setattr(alignment_stage, "alignment", half)
    assert loop.main([*options, "--workdir", str(tmp_path / "run"), "--config.train.accumulate=2"]) == 0
    config = settings.parse([*options, "--workdir=w"])[0]
    model = load_run(tmp_path / "run", "latest")[0]
    places = {name: jax.devices()[0] for name in flatten(model)}
    places = {name: jax.sharding.SingleDeviceSharding(place) for name, place in places.items()}
    start = alignment_stage.initial_params(model.config, "", config.train.seed, places)
    moved = {name for name, x in flatten(model).items() if not np.array_equal(x, start[name])}
    assert {name for name in moved if name.startswith("qformer/")} == set()
    assert {"slide_projection/kernel", "text_region/query/kernel", "logit_scale"} <= moved
    assert not any("qformer" in name for name in arrays(tmp_path / "run", 4) if name.startswith("opt_state/"))


@pytest.fixture
def bert(tiny_cohort, tmp_path):
    """Changes of size -> a random BERT of the small model's sizes and the cohort's words, and its folder."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def make(**changes):
        words = TextTokenizer(tiny_cohort.vocabulary).vocab_size - 1  # all but [DEC]
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(**sizes | {"vocab_size": words} | changes))
        model.save_pretrained(tmp_path / "bert")
        return {name: x.numpy() for name, x in model.state_dict().items()}, tmp_path / "bert"

    return make


def test_training_starts_from_the_weights_of_a_bert(options, bert, tmp_path, monkeypatch):
    """With a step that changes nothing, the first checkpoint is what training starts from."""
    tensors, folder = bert()

    def standing_still(*_):
        return lambda params, frozen, opt_state, batch, number: (params, opt_state, {"loss": np.float32(1)})

    monkeypatch.setattr(loop, "make_step", standing_still)
    more = ["--config.train.steps=1", "--config.data.val_split=none", f"--config.model.bert={folder}"]
    assert loop.main([*options, *more, "--workdir", str(tmp_path / "run")]) == 0
    found = {name: np.asarray(x) for name, x in flatten(load_run(tmp_path / "run", "latest")[0]).items()}
    words = tensors["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(found["qformer/word_embeddings/embedding"][:-1], words)
    positions = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    np.testing.assert_array_equal(found["qformer/position_embeddings/embedding"], positions)
    layer, theirs = "qformer/layers/0", "encoder.layer.0"
    for ours, name in (
        ("self_attention/query", "attention.self.query"),
        ("self_attention/output", "attention.output.dense"),
        ("ffn/output", "output.dense"),
        ("query_ffn/output", "output.dense"),
    ):
        weight = tensors[f"{theirs}.{name}.weight"].T
        assert weight.std() > 0.01
        np.testing.assert_array_equal(found[f"{layer}/{ours}/kernel"].reshape(weight.shape), weight)
    assert found["slide_projection/kernel"].std() > 0.01  # what BERT does not decide is random


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 50}, r"model\.safetensors: 1 tensors do not fit .*word_embeddings.*shape \(50, 16\), expected"),
        ({"max_position_embeddings": 60}, r"position_embeddings.*has shape \(60, 16\), expected \(512, 16\)"),
        ({"hidden_size": 32}, r"BERT and the model config differ: model\.hidden is 16, expected 32"),
    ],
)
def test_a_bert_of_another_size_is_refused(options, bert, tmp_path, changes, message):
    folder = bert(**changes)[1]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loop.main([*options, f"--config.model.bert={folder}", "--workdir", str(tmp_path / "run")])


def test_a_score_that_no_validation_gives_cannot_select(options, tmp_path):
    with pytest.raises(ValueError, match="train.select='val/accuracy': choose one of val/recall_at_1"):
        loop.main([*options, "--workdir", str(tmp_path / "run"), "--config.train.select=val/accuracy"])


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(options, tmp_path):
    """SIGKILL at any moment, in mid-save too: saves after every step, killed at a later moment each time."""
    more = [*options, "--config.train.steps=12", "--config.train.save_every=1", "--config.train.eval_every=3"]
    more += ["--config.model.dropout=0.1", "--workdir"]
    assert loop.main([*more, str(tmp_path / "straight")]) == 0
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    killed, run = 0, tmp_path / "run"
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-m", "pathflip_jax.cli", "train", *more, run], env=environment)
        begin = len(read_metrics(run / "metrics.jsonl"))
        while process.poll() is None and len(read_metrics(run / "metrics.jsonl")) <= begin:
            time.sleep(0.01)
        time.sleep(0.2 * attempt)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
    assert loop.main([*more, str(run)]) == 0
    assert killed >= 2
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    mine, theirs = arrays(tmp_path / "run", 12), arrays(tmp_path / "straight", 12)
    assert mine == theirs
    assert os.listdir(tmp_path / "run/best") == os.listdir(tmp_path / "straight/best")
    assert runs_folder.load_run(tmp_path / "run", "best")


@pytest.mark.slow
def test_a_finished_run_that_is_given_more_steps_ends_as_one_that_had_them_from_the_start(options, tmp_path, capsys):
    """With a learning rate that does not move: else the two differ in it, and in nothing more."""
    rate = [f"--config.optim.{name}=1e-3" for name in ("learning_rate", "warmup_learning_rate", "final_learning_rate")]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert loop.main([*options, *rate, "--workdir", str(run)]) == 0
    more = [*options, *rate, "--config.train.steps=6"]
    assert loop.main([*more, "--workdir", str(run)]) == 0
    assert "was to end at step 4 and will now end at step 6" in capsys.readouterr().err
    assert loop.main([*more, "--workdir", str(whole)]) == 0
    assert metrics(run) == metrics(whole) and arrays(run, 6) == arrays(whole, 6)
    assert json_files.read_json(run / "config.json") == json_files.read_json(whole / "config.json")
