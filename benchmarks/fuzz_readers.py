"""Targets of `fuzz.py`: every reader of user files, with valid files to mutate and the mutations.

A reader gets the broken file and an output folder, and processes it as the corresponding command does.
"""

import io
import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import mutations
import numpy as np
import pyarrow as pa
import tifffile
from hostile_h5 import COORDS, ROWS, features, write_h5
from pyarrow import parquet

from data_prep.jobs import Job, prepare_slide
from data_prep.pool import run_each
from pathflip_jax.convert.bert import bert_settings
from pathflip_jax.convert.checkpoint_files import read_checkpoint
from pathflip_jax.data.readers.features import SlideFeatures, read_features
from pathflip_jax.data.readers.outlines import patches_inside, read_outlines
from pathflip_jax.data.records.index import encode_slide, index_path
from pathflip_jax.data.records.index_file import HEAD
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.storage.framing import Checksummed, crc32c, frame
from pathflip_jax.data.texts.captions import split_sentences
from pathflip_jax.data.texts.text import read_questions, read_slide_table, read_texts
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.data.texts.wordpiece import train_wordpiece
from pathflip_jax.evaluate.colour import patch_colours
from pathflip_jax.evaluate.prompt_files import read_prompts
from pathflip_jax.grounding.canvas import read_thumbnail
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.monitoring import metrics
from pathflip_jax.runs import files
from pathflip_jax.runs import folder as runs_folder

CAPTION = "Glands infiltrate the stroma. Necrosis is extensive, about 1.8 cm. No mucin is seen (see fig. 2)."


@dataclass(frozen=True)
class Reader:
    """Kind of file: its name, its share of the inputs, valid files, their mutations, and the reader.

    `read(path, out)` may raise anything. `file` is the name of the broken file in the folder that `prepare` fills with
    its companion files; an error must name the file, or with `beside` any file in that folder.
    """

    name: str
    weight: int
    file: str
    seeds: Callable[[Path], list[bytes]]
    mutate: mutations.Mutation
    read: Callable[[Path, Path], object]
    prepare: Callable[[Path], None] | None = None
    beside: bool = False


# ---- valid files ----


def _slide(name: str = "S1") -> SlideFeatures:
    place = {"coords": COORDS, "patch_size": 256, "mpp": 0.5, "width": 1024, "height": 768}
    return SlideFeatures(name, "P1", features(), encoder="enc", **place)


def _h5(kind: str) -> Callable[[Path], list[bytes]]:
    def seeds(_: Path) -> list[bytes]:
        found = [write_h5(kind), write_h5(kind, chunks=(4, 2)), write_h5(kind, chunks=(ROWS, 2), compression="gzip")]
        return [*found, write_h5(kind, chunks=(4, 2), shuffle=True, fletcher32=True)]

    return seeds


def _h5_mutation(kind: str) -> mutations.Mutation:
    return mutations.mix_with_blind(0.8, lambda rng, _: write_h5(kind, rng, **rng.choice(({}, {"chunks": (4, 2)}))))


def _torch_seeds(folder: Path) -> list[bytes]:
    import torch

    tensor = torch.tensor(features())
    values = [tensor, tensor.half(), tensor.bfloat16(), tensor.double(), tensor.t(), tensor[::2]]
    values += [torch.as_strided(tensor, (10**12, 4), (0, 1)), torch.zeros(3), {"features": tensor}, torch.tensor(3)]
    values += [{"tile_embeds": tensor, "coords": torch.tensor(COORDS)}, {"features": tensor, "coords": tensor[:3]}]
    values += [tensor.to_sparse(), torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), tensor.to("meta")]
    found = []
    for value in values:
        for zipped in (True, False):
            out = io.BytesIO()
            try:
                torch.save(value, out, _use_new_zipfile_serialization=zipped)
            except RuntimeError:  # the old container takes no meta tensors
                continue
            found.append(out.getvalue())
    return found + mutations.hostile_pickles(str(folder / "canary"))


def _state_seeds(folder: Path) -> list[bytes]:
    import safetensors.numpy
    import torch

    tensors = {"path_encoder.weight": features(), "query_tokens": features()[None], "x.num": np.arange(3)}
    found = [safetensors.numpy.save(tensors, {"format": "pt"}), safetensors.numpy.save({})]
    for value in ({k: torch.tensor(v) for k, v in tensors.items()}, {"state_dict": {"a": torch.zeros(2)}, "epoch": 3}):
        out = io.BytesIO()
        torch.save(value, out)
        found.append(out.getvalue())
    return found + mutations.hostile_pickles(str(folder / "canary"))


def _torch_mutation(rng: random.Random, seeds: list[bytes]) -> bytes:
    zipped = [seed for seed in seeds if seed[:2] == b"PK"]
    if rng.random() < 0.15:
        return rng.choice(seeds)
    return mutations.zip_entries(rng, zipped) if rng.random() < 0.5 else mutations.blind(rng, seeds)


def _csv_features(_: Path) -> list[bytes]:
    header = ",".join(map(str, range(4))) + ",patch_name\n"
    rows = [[*map(repr, x), "{}_{}.png".format(*xy)] for x, xy in zip(features().tolist(), COORDS, strict=True)]
    text = header + "".join(",".join(row) + "\n" for row in rows)
    return [text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()]


def _rows(*rows: dict) -> list[bytes]:
    return [json.dumps(list(rows)).encode(), "\n".join(json.dumps(row) for row in rows).encode()]


def _parquet(*rows: dict) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def _csv(*rows: dict) -> bytes:
    lines = [",".join(rows[0])] + [",".join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join(lines).encode("utf-8-sig")


TALK = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": CAPTION}]
TEXTS = (
    {"slide_id": "S1", "caption": CAPTION}, {"slide_id": ["S1", "S2"], "case_id": "P1", "caption": CAPTION},
    {"slide_id": "S3", "caption": CAPTION, "subcaptions": ["Glands.", "Necrosis."]},
    {"id": "t::0", "image": ["BRCA/TCGA-A7-A0CJ-01Z-00-DX2.csv"], "conversations": TALK},
)  # fmt: skip
CAPTIONS = {"ID": "1", "Slide": "a/TCGA-A7-A0CJ-01Z-00-DX2.svs", "Tumor": "BRCA", "Question": "?", "Caption": CAPTION}
QUESTION = {"ID": "7", "Slide": "S1", "Tumor": "LUAD", "Broad Category": "D", "Narrow Category": "G", "Question": "Q?",
            "A": "G1", "B": "G2", "C": "", "D": "", "Answer": "B"}  # fmt: skip
QUESTIONS = (
    {"Id": "TCGA-LD-A74U", "Question": "Grade?", "Choice": ["low", "High."], "Answer": "high"},
    {"Id": "TCGA-LD-A74U", "Question": "Survival?", "Answer": 1881},
    {"id": "0", "image": "S1", "conversations": [
        {"from": "human", "value": "<image>\nWhich? A) Grade 1 B) Grade 2"}, {"from": "gpt", "value": "B"}]},
)  # fmt: skip
SLIDES = {"slide_id": "x/S1.svs", "patient_id": "P1", "label": "a", "split": "Train", "mpp": "0.5"}
PROMPTS = {
    "task": "grade",
    "templates": ["{}", "a slide of {}."],
    "classes": {"low": ["low grade"], "high": ["a", "b"]},
}
RING = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
OUTLINES = {"type": "FeatureCollection", "features": [
    {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [RING]},
     "properties": {"objectType": "annotation", "classification": {"name": "tumor"}}},
    {"type": "Feature", "properties": {"name": "x"},
     "geometry": {"type": "MultiPolygon", "coordinates": [[RING, RING]]}},
    {"type": "Feature", "properties": {"classification": {"names": ["tumor", "region"]}},
     "geometry": {"type": "GeometryCollection", "geometries": [
         {"type": "Polygon", "coordinates": [RING]}, {"type": "Point", "coordinates": [1, 2]}, None]}},
]}  # fmt: skip


def _fill_records(folder: Path) -> None:
    write_shard(folder / shard_name(0), [_slide("S1"), _slide("S2")])
    finish_folder(folder)


def _of_records(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        made = folder / f"records-{name}"
        made.mkdir()
        _fill_records(made)
        data = (made / name).read_bytes()
        shutil.rmtree(made)
        return [data]

    return seeds


def _record(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Shard with valid checksums and a mutated Example."""
    from tensorflow_datasets.proto import tf_example_pb2

    parts, _ = encode_slide(_slide(), cut="grid", edge_um=2048.0, edge_px=None, dtype="float16")
    data = b"".join(bytes(part.data if isinstance(part, Checksummed) else part) for part in parts)
    if rng.random() < 0.3:
        data = mutations.blind(rng, [data])
    else:
        example = tf_example_pb2.Example.FromString(data)
        feature = example.features.feature
        for key in rng.sample(sorted(feature), rng.choice((1, 1, 2))):
            if rng.random() < 0.1:
                del feature[key]
            elif feature[key].bytes_list.value:
                old = feature[key].bytes_list.value[0]
                text = str(rng.choice(mutations.VALUES)).encode("utf-8", "surrogatepass")
                new = rng.choice((old[: len(old) // 2], old * 2, text, b"\xff\xfe", mutations.blind(rng, [old])))
                feature[key].bytes_list.value[:] = rng.choice(([new], [new, new], []))
            else:
                kind, limit = ("float_list", 3e38) if key == "mpp" else ("int64_list", 2**63 - 1)
                values = getattr(feature[key], kind).value
                numbers = [v for v in mutations.NUMBERS if -limit <= v <= limit and (key == "mpp" or int(v) == v)]
                at, new = rng.randrange(len(values) + 1), rng.choice(numbers)
                new = new if key == "mpp" else int(new)
                changed = [*values[:at], new, *values[at + rng.choice((0, 1)) :]]
                values[:] = rng.choice((changed, changed, [], changed * 50))
        data = example.SerializeToString()
    head, tail = frame(data)
    return (head + data + tail) * rng.choice((1, 1, 1, 2))


def _index(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Index with a valid checksum and mutated header or arrays."""
    data = rng.choice(seeds)
    magic, version, length = HEAD.unpack_from(data)
    head, arrays = data[HEAD.size : HEAD.size + length], data[HEAD.size + length : -4]
    if rng.random() < 0.75:
        head = mutations.json_text(rng, [head])
    else:
        arrays = mutations.blind(rng, [arrays])
    length = rng.choice((len(head),) * 12 + (0, 2**62, len(head) + 1))
    data = HEAD.pack(magic, version, length) + head + arrays
    return data + struct.pack("<I", crc32c(data))


MODEL = PathFLIPConfig(
    feature_dim=8, embed_dim=8, hidden=8, layers=1, heads=2, intermediate=16, num_queries=2, max_positions=16,
    region_layers=1, region_heads=2, text_region_heads=2, vocab_size=64,
)  # fmt: skip
CONFIG = {"data": {"encoder": "enc", "cut": "grid", "edge_um": 2048.0, "edge_px": None, "caption_length": 384}}


def _fill_vocabulary(folder: Path) -> None:
    train_wordpiece([CAPTION], folder, vocab_size=60)


def _tokenizer_seeds(name: str) -> Callable[[Path], list[bytes]]:
    def seeds(folder: Path) -> list[bytes]:
        _fill_vocabulary(folder / f"words-{name}")
        return [(folder / f"words-{name}" / name).read_bytes()]

    return seeds


def _fill_run(folder: Path) -> None:
    from flax import nnx

    from pathflip_jax.model.pathflip import PathFLIP

    _fill_vocabulary(folder / "words")
    model = PathFLIP(MODEL, nnx.Rngs(0))
    runs_folder.save_run(folder / "run", model, CONFIG, TextTokenizer(folder / "words"))


def _run_files(folder: Path) -> list[bytes]:
    """Small files of a checkpoint, each as its path within the run, a line feed, and its content."""
    made = folder / "made-run"
    made.mkdir()
    _fill_run(made)
    paths = sorted(path for path in (made / "run").rglob("*") if path.is_file())
    found = [str(path.relative_to(made / "run")).encode() + b"\n" + path.read_bytes() for path in paths]
    shutil.rmtree(made)
    return found


def _run_mutation(rng: random.Random, seeds: list[bytes]) -> bytes:
    name, _, data = rng.choice(seeds).partition(b"\n")
    json_like = data[:1] == b"{" and rng.random() < 0.6
    return name + b"\n" + (mutations.json_text if json_like else mutations.blind)(rng, [data])


def write_slide(compression: str = "jpeg", tiles: bool = True) -> bytes:
    """Write a small pyramidal TIFF that OpenSlide recognises as a slide."""
    rng, out = np.random.default_rng(0), io.BytesIO()
    picture = rng.integers(90, 255, (8, 8, 3), dtype=np.uint8).repeat(64, 0).repeat(64, 1)
    with tifffile.TiffWriter(out) as writer:
        for step in (1, 4):
            layout = {"tile": (128, 128)} if tiles else {"rowsperstrip": 32}
            writer.write(
                picture[::step, ::step], photometric="rgb", compression=compression, subfiletype=int(step > 1),
                resolution=(20000 / step, 20000 / step), resolutionunit="CENTIMETER", metadata=None, **layout,
            )  # fmt: skip
    return out.getvalue()


# ---- readers ----


def _read_features(path: Path, out: Path) -> None:
    slide = read_features(path, mpp=0.25)
    try:
        cut = "grid" if slide.coords is not None else "scan"
        write_shard(out / shard_name(0), [slide], cut=cut)
    except ValueError as error:  # as `pathflip import` reports it
        raise ValueError(f"{path}: {error}") from None


def _read_records(path: Path, out: Path) -> None:
    index_path(path).unlink(missing_ok=True)
    _read_shard(path, out)


def _read_shard(path: Path, out: Path) -> None:
    records = Records([path])
    for position in range(len(records)):
        records.coords(position)
        records.read_regions(position, range(min(records.slides[position].num_regions, 3)))
        slide = records.read(position)
        np.savez(out / f"{slide.slide_id}.npz", features=slide.features)  # as `pathflip ground` names its pictures


def _read_index(path: Path, out: Path) -> None:
    _read_shard(path.with_suffix(""), out)


def _read_captions(path: Path, out: Path) -> None:
    for text in read_texts(path):
        split_sentences(text.caption)


def _read_outlines(path: Path, out: Path) -> None:
    for polygons in read_outlines(path).values():
        patches_inside(polygons, COORDS, 256)


def _read_prepared(path: Path, out: Path) -> None:
    settings = {
        "encoder": "stain_texture", "half": False, "patch_size": 128, "mpp": 0.5, "assume_mpp": 0.5, "min_tissue": 0.1,
        "cut": "grid", "edge_um": 2048.0,
    }  # fmt: skip
    job = Job("S1", "", path, out / shard_name(0), out / "S1.tfrecord", settings, 1)
    ((_, outcome),) = run_each(prepare_slide, [job], 1)
    if outcome is None:
        raise ValueError(f"{path}: the worker process died")  # as `pathflip prepare` reports it
    if outcome.fatal:
        raise RuntimeError(f"one slide stopped the whole run: {outcome.error}")
    if outcome.error:
        raise ValueError(outcome.error)


def _read_pixels(path: Path, out: Path) -> None:
    read_thumbnail(path, 256)
    patch_colours(path, COORDS[:4], 256)


def _read_run(path: Path, out: Path) -> None:
    name, _, data = path.read_bytes().partition(b"\n")
    run, broken = path.with_name("run"), path.with_name("broken")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(run, broken)
    (broken / name.decode()).write_bytes(data)
    runs_folder.load_run(broken)


def _read_manifest(path: Path, out: Path) -> None:
    faults = verify(path.parent)
    if faults:
        raise ValueError("; ".join(faults))


def _read_metrics(path: Path, out: Path) -> None:
    metrics.truncate_metrics(path, 2)


def _json_seeds(*values: object) -> Callable[[Path], list[bytes]]:
    return lambda _: [json.dumps(value, indent=indent).encode() for value in values for indent in (None, 1)]


JSON_TEXT = mutations.mix_with_blind(0.35, mutations.json_text)
TABLE = mutations.mix_with_blind(0.4, mutations.table)
METRICS = [{"step": step, "loss": 1.0 / step, "val/recall_at_1": 0.5} for step in (1, 2, 3)]


def readers() -> Iterator[Reader]:
    """All readers, h5 files first."""
    for kind in ("clam", "trident", "stamp", "atlas"):
        yield Reader(f"h5 {kind}", 0, "x.h5", _h5(kind), _h5_mutation(kind), _read_features)
    yield Reader(
        "h5 patches beside", 0, "patches/x.h5", _h5("patches"), _h5_mutation("patches"),
        lambda path, out: read_features(path.parents[1] / "features" / "x.h5"),
        _fill_features, True,
    )  # fmt: skip
    yield Reader("pt", 40, "x.pt", _torch_seeds, _torch_mutation, _read_features)
    yield Reader("state dict", 30, "x.ckpt", _state_seeds, _torch_mutation, lambda p, _: read_checkpoint(p))
    safe = lambda folder: [seed for seed in _state_seeds(folder) if seed[8:9] == b"{"]  # noqa: E731
    yield Reader("safetensors", 30, "x.safetensors", safe, mutations.blind, lambda p, _: read_checkpoint(p))
    yield Reader("csv features", 100, "x.csv", _csv_features, TABLE, _read_features)
    yield Reader("csv captions", 100, "x.csv", lambda _: [_csv(CAPTIONS, CAPTIONS)], TABLE, _read_captions)
    yield Reader("csv questions", 70, "x.csv", lambda _: [_csv(QUESTION)], TABLE, lambda p, _: read_questions(p))
    yield Reader("csv slides", 80, "x.csv", lambda _: [_csv(SLIDES)], TABLE, lambda p, _: read_slide_table(p))
    columns = {"slide_id": ["S1", "S2"], "case_id": 7.0, "caption": CAPTION, "subcaptions": ["Fat.", None]}
    yield Reader("parquet", 60, "x.parquet", lambda _: [_parquet(columns, columns)], mutations.blind, _read_captions)
    yield Reader("json captions", 120, "x.json", lambda _: _rows(*TEXTS), JSON_TEXT, _read_captions)
    yield Reader("json questions", 80, "x.json", lambda _: _rows(*QUESTIONS), JSON_TEXT, lambda p, _: read_questions(p))
    yield Reader("json slides", 40, "x.json", lambda _: _rows(SLIDES), JSON_TEXT, lambda p, _: read_slide_table(p))
    concepts = {"necrosis": ["tumor necrosis"], "fat": ["fat", "adipose tissue"]}
    yield Reader("prompts", 60, "x.json", _json_seeds(PROMPTS, concepts), JSON_TEXT, lambda p, _: read_prompts(p))
    yield Reader("outlines", 60, "x.geojson", _json_seeds(OUTLINES), JSON_TEXT, _read_outlines)
    shard = shard_name(0)
    yield Reader("tfrecord", 80, shard, _of_records(shard), mutations.mix_with_blind(0.2, _record), _read_records)
    index = index_path(shard).name
    beside = {"prepare": _fill_records, "beside": True}
    yield Reader("index", 80, index, _of_records(index), mutations.mix_with_blind(0.1, _index), _read_index, **beside)
    yield Reader("manifest", 20, "manifest.json", _of_records("manifest.json"), JSON_TEXT, _read_manifest, **beside)
    model = _json_seeds(MODEL.to_dict())
    yield Reader("model.json", 30, "model.json", model, JSON_TEXT, lambda p, _: files.read_model_config(p))
    predict = lambda path, _: Predictor(SimpleNamespace(config=MODEL), json_files.read_json(path), None, str(path))  # noqa: E731
    yield Reader("config.json", 30, "config.json", _json_seeds(CONFIG), JSON_TEXT, predict)
    lines = "".join(json.dumps(row) + "\n" for row in METRICS).encode()
    yield Reader("metrics.jsonl", 20, "metrics.jsonl", lambda _: [lines], JSON_TEXT, _read_metrics)
    for name in ("vocab.txt", "tokenizer.json"):
        prepare = {"prepare": _fill_vocabulary if name == "tokenizer.json" else _fill_words, "beside": True}
        yield Reader(name, 20, name, _tokenizer_seeds(name), JSON_TEXT if name[-4:] == "json" else mutations.blind,
                     lambda path, _: TextTokenizer(path.parent).encode([CAPTION], 64), **prepare)  # fmt: skip
    bert = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 60, "max_position_embeddings": 16}  # fmt: skip
    yield Reader("bert config", 10, "config.json", _json_seeds(bert), JSON_TEXT, lambda p, _: bert_settings(p.parent))
    yield Reader("checkpoint", 6, "part", _run_files, _run_mutation, _read_run, _fill_run, True)
    pictures = lambda _: list(itertools.starmap(write_slide, (("jpeg", True), ("zlib", True), (None, False))))  # noqa: E731
    yield Reader("slide thumbnail", 12, "x.tiff", pictures, mutations.blind, _read_pixels)
    yield Reader("slide prepare", 6, "x.tiff", pictures, mutations.blind, _read_prepared)


def _fill_words(folder: Path) -> None:
    _fill_vocabulary(folder)
    (folder / "tokenizer.json").unlink()


def _fill_features(folder: Path) -> None:
    """CLAM's features, with the patch size in the companion file."""
    (folder / "features").mkdir()
    with h5py.File(folder / "features" / "x.h5", "w") as file:
        file["features"], file["coords"] = features(), COORDS
