"""`pathflip doctor`: is this machine, are these data and configs, ready? Each fault comes with its cure.

An experiment that fails after a night's queue usually failed on something that could be known before it began:
a package, a device, a folder of records with one bad byte, a table of other slide ids, a missing vocabulary.
"""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers")
SLIDES = ("openslide-python", "openslide-bin", "scikit-image", "h5py")
# What each extra adds, and the sign that it is there.
EXTRAS = {
    "torch": ("torch", "read and write PyTorch checkpoints other than .safetensors"),
    "aot": ("libtpu", "compile for TPUs that are not there: memory, traffic and scaling of a pod (benchmarks/aot.py)"),
    "encoders": ("timm", "encode patches with timm and Hugging Face vision models"),
}
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 10, 8


class Finding(NamedTuple):
    """One thing looked at: its name, what was found, `ok`, `note` or `fault`, and what to do about a fault."""

    name: str
    found: str
    state: str
    cure: str = ""


def examine(
    *, records: Path | None = None, texts: Path | None = None, configs: list[str] | None = None
) -> list[Finding]:
    """Look at the machine, and at the data folders and configs that are named; nothing is changed."""
    findings = [*_versions(), *_devices(), *_room(), *_offline()]
    if records is not None:
        findings += _records(records)
    if texts is not None:
        findings += _texts(texts, records)
    for config in configs or []:
        findings.append(_config(config))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """One line a finding, its cure below it, and a last line that counts the faults."""
    width = max(len(finding.name) for finding in findings)
    for name, found, state, cure in findings:
        print(f"{state:5}  {name:{width}}  {found}")
        if cure:
            print(f"{'':5}  {'':{width}}  -> {cure}")
    faults = sum(finding.state == "fault" for finding in findings)
    print(f"\n{faults} faults." if faults != 1 else "\n1 fault.")


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    supported = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    yield Finding("python", python, "ok" if supported else "fault", "" if supported else "use Python 3.11 or 3.12")
    for package in (*CORE, *SLIDES):
        try:
            yield Finding(package, metadata.version(package), "ok")
        except metadata.PackageNotFoundError:
            yield Finding(package, "not installed", "fault", "run `make setup`, or `pip install pathflip-jax` anew")
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                f"extra [{extra}]", "not installed", "note", f"`pip install pathflip-jax[{extra}]` to {purpose}"
            )
        else:
            yield Finding(f"extra [{extra}]", metadata.version(module), "ok")


def _devices() -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding("devices", str(error).splitlines()[0], "fault", "check JAX_PLATFORMS and the driver")
        return
    kinds = sorted({device.device_kind for device in devices})
    yield Finding("devices", f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform})", "ok")
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("gpu", "there is a GPU that jax does not see", "fault", "`pip install pathflip-jax[gpu]`")


def _room() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cure = f"training wants {LITTLE_MEMORY_GB} GB: use a smaller batch" if memory < LITTLE_MEMORY_GB else ""
    yield Finding("memory", f"{memory:.0f} GB, {os.cpu_count()} cores", "note" if cure else "ok", cure)
    free = shutil.disk_usage(".").free / 2**30
    cure = "records and checkpoints need room: free some, or work elsewhere" if free < LITTLE_DISK_GB else ""
    yield Finding("disk", f"{free:.0f} GB free here", "note" if cure else "ok", cure)


def _offline() -> Iterator[Finding]:
    """What a machine without a network would lack: nothing here downloads, model folders must be there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = sorted(path.name[8:].replace("--", "/") for path in Path(HF_HUB_CACHE).glob("models--*"))
    if cached:
        yield Finding("offline", f"cached models: {', '.join(cached)}", "ok")
    else:
        yield Finding(
            "offline",
            "no Hugging Face model is cached",
            "note",
            "before going offline, download a BERT folder (config.json, vocab.txt, model.safetensors) and name it as "
            "config.data.tokenizer and config.model.bert; without one, `pathflip vocabulary` trains a small vocabulary",
        )


def _records(folder: Path) -> Iterator[Finding]:
    from pathflip_jax.data.records import Records, verify

    try:
        cohort = Records(folder)
    except (ValueError, OSError) as error:
        yield Finding("records", str(error), "fault", "write them with `pathflip prepare` or `pathflip import`")
        return
    patches = sum(slide.num_patches for slide in cohort.slides)
    size = f"{len(cohort.slides)} slides, {patches} patches of {cohort.encoder} ({cohort.feature_dim} wide)"
    yield Finding("records", size, "ok")
    for fault in verify(folder):
        yield Finding("records", str(fault), "fault", "delete that shard with its .idx and run the same command again")


def _texts(path: Path, records: Path | None) -> Iterator[Finding]:
    from pathflip_jax.data.records import Records
    from pathflip_jax.data.text import match_texts, read_texts

    try:
        texts = read_texts(path)
        found = f"{len(texts)} texts"
        if records is not None:
            matched = match_texts(texts, [slide.slide_id for slide in Records(records).slides])
            found += f", {len(matched)} of them with a slide in {records}"
    except (ValueError, OSError) as error:
        yield Finding("texts", str(error), "fault")
        return
    yield Finding("texts", found, "ok")


def _config(name: str) -> Finding:
    from pathflip_jax.train import check_config

    try:
        parameters = check_config(name)
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        return Finding(f"config {name}", str(error), "fault", "compare it with configs/align_base.py")
    return Finding(f"config {name}", f"a model of {parameters / 1e6:.1f} M parameters", "ok")
