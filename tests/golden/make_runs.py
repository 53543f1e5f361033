"""The golden runs of a version: what later versions must read, with the numbers that they must find.

Run once when a version is released, on a CPU, from the root of the project, with the code of that version:

    python tests/golden/make_runs.py

It writes tests/golden/runs/VERSION and refuses to write over it. A tiny cohort (records, reports, slide table,
vocabulary), a run of each family stopped after two of three steps, a language run on top, embeddings, exports, the
commands that made them (commands.json) and the numbers (expected.npz). Everything is drawn from fixed seeds; all paths
are relative to the version's folder. A file that others equal, byte for byte, is kept once, and they are links to it.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import numpy as np

from pathflip_jax import cli
from pathflip_jax.convert.decoder import init_decoder, make_decoder_folder, save_decoder
from pathflip_jax.convert.decoder_folders import read_decoder_config
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.texts.wordpiece import train_wordpiece
from pathflip_jax.inference import assistant as assistants
from pathflip_jax.inference import load
from pathflip_jax.monitoring.metrics import read_metrics
from pathflip_jax.training import loop

SENTENCES = (
    "Glands infiltrate the stroma.",
    "Necrosis is extensive.",
    "Fat is seen at the edge.",
    "No mucin is present.",
    "Lymphoid aggregates are dense.",
    "The tumor measures 1.8 cm.",
)
STOP = 2  # of three steps
DATA = [
    "--config.data.records=records",
    "--config.data.slides=slides.csv",
    "--config.data.texts=reports.jsonl",
    "--config.data.regions=2",
    "--config.data.patch_slots=4",
    "--config.train.batch_size=4",
    "--config.train.steps=3",
]
ALIGN = ["--config.data.tokenizer=vocabulary", "--config.model.hidden=8", "--config.model.layers=1"]
ALIGN += ["--config.model.embed_dim=8", "--config.model.intermediate=16", "--config.model.max_positions=64"]
ALIGN += ["--config.model.init=fan_in"]  # at 0.02 all slides are nearly one
SPEAK = ["--config.lm.aligner=pathflip", "--config.lm.decoder=decoder", "--config.lm.lora_rank=2"]
SPEAK += ["--config.lm.lora_targets=q_proj,down_proj"]
SPEAK += ["--config.optim.learning_rate=0.1", "--config.optim.warmup_steps=1"]  # so that two steps tell
RUNS = {
    "pathflip": ["--config=align_base:smoke", *DATA, *ALIGN],
    "pathflip2": ["--config=pathflip2:smoke", *DATA, *ALIGN],
    "language": ["--config=lm_stage2:smoke", *DATA, *SPEAK],
}
QUESTION, ANSWERS = "Is necrosis present?", ("Necrosis is extensive.", "No mucin is present.")
ASK = ["ask", "records", "--slide-id=S00", QUESTION, "--checkpoint=language", "--max-tokens=8"]
ASK += ["--repetition-penalty=1.3", "--json"]  # the likeliest token each time, and no word again and again
# Of step 2 checkpoints and best are the same: one run keeps both, for a version's folder to stay below 1 MB.
STEPS = {"checkpoints", "best"}
KEPT = {"config.json", "model.json", "tokenizer", "checkpoints", "metrics.jsonl"}
KEPT_OF = dict.fromkeys(RUNS, KEPT) | {"language": KEPT | {"best"}}
EXPORTS = dict.fromkeys(("pathflip", "pathflip2"), ("pytorch", "huggingface")) | {"language": ("peft", "huggingface")}


def make_cohort() -> None:
    """Twelve slides of 16 patches with random features; eight train, four validate."""
    rng = np.random.default_rng(0)
    slides, texts, table = [], [], ["slide_id,patient_id,label,split"]
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2)
    place = {"coords": (grid * 64).astype(np.int32), "patch_size": 64, "mpp": 0.5, "width": 256, "height": 256}
    for number in range(12):
        features = rng.normal(size=(len(grid), 16)).astype(np.float32)
        slides.append(SlideFeatures(f"S{number:02d}", f"P{number:02d}", features, encoder="tiny", **place))
        texts.append({"slide_id": f"S{number:02d}", "caption": " ".join(rng.permutation(SENTENCES)[:4])})
        split = "train" if number < 8 else "val"
        table.append(f"S{number:02d},P{number:02d},{'glandular' if number % 2 else 'solid'},{split}")
    Path("records").mkdir()
    for shard in range(2):
        write_shard(Path("records") / shard_name(shard), slides[shard * 6 : shard * 6 + 6], edge_um=64.0)
    finish_folder(Path("records"), edge_um=64.0)
    Path("reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    Path("slides.csv").write_text("\n".join(table) + "\n")
    captions = [row["caption"] for row in texts]
    train_wordpiece(captions, Path("vocabulary"), vocab_size=100)
    make_decoder_folder(captions, "words", vocab_size=300, width=64, layers=1)
    path = Path("words/config.json")
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | small | {"intermediate_size": 32}, indent=2))
    # Larger numbers than training starts with: else a decoder whose words are tied says the last one once more.
    decoder = jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, init_decoder(read_decoder_config("words"), 0))
    save_decoder(decoder, "decoder", source="words")
    shutil.rmtree("words")


def make_run(name: str) -> dict[str, np.ndarray]:
    """A run stopped after two of three steps; the losses of a whole one."""
    assert loop.main([*RUNS[name], "--workdir=whole"]) == 0
    losses = [row["loss"] for row in read_metrics(Path("whole/metrics.jsonl"))]
    shutil.rmtree("whole")
    asked, loop.StopSignal.requested = loop.StopSignal.requested, lambda self, step: step == STOP
    try:
        assert loop.main([*RUNS[name], f"--workdir={name}"]) == loop.TRY_AGAIN
    finally:
        loop.StopSignal.requested = asked
    for path in Path(name).iterdir():
        if path.name not in KEPT_OF[name]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {f"{name}/losses": np.array(losses)}


def measure(name: str) -> dict[str, np.ndarray]:
    """The embeddings of all slides, their regions and some texts by the last checkpoint of a run."""
    predictor, records = load.load(name, which="latest"), Records("records")
    found = list(predictor.encode_slides(records.read(number) for number in range(len(records.slides))))
    texts = predictor.encode_texts(SENTENCES)
    return {
        f"{name}/slides": np.stack([x.slide for x in found]),
        f"{name}/regions": np.stack([x.regions for x in found]),
        f"{name}/texts": texts.slide,
        f"{name}/region_texts": texts.region,
    }


def measure_language() -> dict[str, np.ndarray]:
    """Log-likelihoods of two answers to a question about two slides and about none, and the generated answers."""
    assistant, records = assistants.load_assistant("language", which="latest"), Records("records")
    slides = [*assistant.embed_slides([records.read(0), records.read(1)]), None]
    likely = assistant.choose([assistant.prompt(QUESTION, slide) for slide in slides], [ANSWERS] * len(slides))
    text, tokens = answer()
    found = {"likelihoods": np.stack(likely), "text": np.array(text), "tokens": tokens}
    return {f"language/{name}": value for name, value in found.items()}


def answer() -> tuple[str, np.ndarray]:
    """Answer of `pathflip ask` by the run's best checkpoint, and the tokens that it generated."""
    written, generate = [], assistants.generate
    assistants.generate = lambda *given, **more: written.append(generate(*given, **more)) or written[-1]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(ASK) == 0
    finally:
        assistants.generate = generate
    return json.loads(said.getvalue())["answer"], written[0].tokens[0, : written[0].lengths[0]]


def export() -> None:
    """Embeddings, and exports of every kind."""
    commands = [["embed", "records", "--checkpoint=pathflip", "--regions", "--out=embeddings.parquet"]]
    for name, kinds in EXPORTS.items():
        commands += [["export", name, f"--to={kind}", f"--out={name}_{kind}"] for kind in kinds]
    for command in commands:
        assert cli.main([*command, *(["--which=latest"] if command[0] == "export" else [])]) == 0


def link_copies() -> None:
    """Keep once what several exports, runs and folders of words hold: a version's folder stays below 1 MB."""
    kept: dict[bytes, Path] = {}
    for path in sorted(path for path in Path().rglob("*") if path.is_file() and not STEPS & set(path.parts)):
        first = kept.setdefault(path.read_bytes(), path)
        if first != path:
            path.unlink()
            path.symlink_to(os.path.relpath(first, path.parent))


def main() -> int:
    """Write the golden runs of the installed version."""
    version = importlib.metadata.version("pathflip-jax")
    out = Path(__file__).resolve().parent / "runs" / version
    if out.exists():
        print(f"{out}: exists; golden runs are made once, when a version is released", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_cohort()
        found = {}
        for name in RUNS:
            found |= make_run(name)
        found |= measure("pathflip") | measure("pathflip2") | measure_language()
        export()
        asked = {"language/question": np.array(QUESTION), "language/answers": np.array(ANSWERS)}
        np.savez_compressed("expected.npz", texts=np.array(SENTENCES), **asked, **found)
        Path("commands.json").write_text(json.dumps(RUNS | {"ask": ASK}, indent=2) + "\n")
        link_copies()
        shutil.copytree(folder, out, symlinks=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
