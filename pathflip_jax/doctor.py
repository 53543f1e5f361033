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

from pathflip_jax.data.storage import Place

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "tokenizers")
SLIDES = ("openslide-python", "openslide-bin", "scikit-image", "h5py")
# What each extra adds, and the sign that it is there.
EXTRAS = {
    "torch": ("torch", "read and write PyTorch checkpoints other than .safetensors"),
    "gcs": ("gcsfs", "read and write records in Google Cloud Storage, gs://"),
    "s3": ("s3fs", "read and write records in Amazon S3 and what speaks like it, s3://"),
    "aot": ("libtpu", "compile for TPUs that are not there: memory, traffic and scaling of a pod (benchmarks/aot.py)"),
    "encoders": ("timm", "encode patches with timm and Hugging Face vision models"),
    "viewer": ("starlette", "show slides in a browser: pathflip serve"),
    "profile": ("xprof", "view what `pathflip train --profile` traces"),
    "wandb": ("wandb", "log to Weights & Biases (train.wandb_project)"),
    "beam": ("apache_beam", "prepare slides on a cluster with Apache Beam"),
}
# The program that each script of launch/ hands the work to.
LAUNCHERS = {"gcloud": "tpu.sh", "xpk": "xpk.sh", "nvidia-smi": "gpus.sh", "sbatch": "slurm.sh", "kubectl": "jobset.sh"}
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 10, 8


class Finding(NamedTuple):
    """One thing looked at: its name, what was found, `ok`, `note` or `fault`, and what to do about a fault."""

    name: str
    found: str
    state: str
    cure: str = ""


def examine(
    *, records: Place | None = None, texts: Place | None = None, configs: list[str] | None = None
) -> list[Finding]:
    """Look at the machine, and at the data folders and configs that are named; nothing is changed."""
    findings = [*_versions(), *_devices(), _launcher(), _launchers(), *_room(), _reader(), *_offline()]
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
    if devices[0].platform != "cpu":
        yield _utilisation(devices[0].device_kind)
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("gpu", "there is a GPU that jax does not see", "fault", "`pip install pathflip-jax[gpu]`")


def _utilisation(kind: str) -> Finding:
    from pathflip_jax.telemetry import PEAK_BFLOAT16

    if kind in PEAK_BFLOAT16:
        return Finding("utilisation", f"of {PEAK_BFLOAT16[kind] / 1e12:g} TFLOP/s in bfloat16 on each {kind}", "ok")
    cure = "add its bfloat16 rate to PEAK_BFLOAT16 in pathflip_jax/telemetry.py; until then runs report none"
    return Finding("utilisation", f"nobody knows what {kind} can do at most", "note", cure)


def _launcher() -> Finding:
    """Which processes `pathflip train` would join, started as this command was."""
    from pathflip_jax.distributed import SWITCH, find_launch

    try:
        launch = find_launch()
    except ValueError as error:
        return Finding("launcher", str(error), "fault", f"or set {SWITCH}=0 to train in one process")
    if launch is None:
        return Finding("launcher", "none: one process trains alone", "ok")
    return Finding("launcher", f"process {launch.process} of {launch.processes}, found by {launch.found_by}", "ok")


def _room() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cure = f"training wants {LITTLE_MEMORY_GB} GB: use a smaller batch" if memory < LITTLE_MEMORY_GB else ""
    yield Finding("memory", f"{memory:.0f} GB, {os.cpu_count()} cores", "note" if cure else "ok", cure)
    free = shutil.disk_usage(".").free / 2**30
    cure = "records and checkpoints need room: free some, or work elsewhere" if free < LITTLE_DISK_GB else ""
    yield Finding("disk", f"{free:.0f} GB free here", "note" if cure else "ok", cure)


def _reader() -> Finding:
    """Whether the process starts that parses HDF5, .pt and slide files, whatever these do to it."""
    from pathflip_jax.data import guarded

    try:
        guarded.parse("pathflip_jax.data.slide_pixels:detect", Path(__file__))
    except (ValueError, OSError, ImportError) as error:
        cure = "feature files and slides are parsed in a process of their own: let this one start Python"
        return Finding("file reader", str(error), "fault", cure)
    limits = "memory and time" if Path("/proc/self/statm").exists() else "time; this system does not limit memory"
    return Finding("file reader", f"a process of its own, limits on {limits}", "ok")


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


def _launchers() -> Finding:
    found = [f"launch/{script} ({program})" for program, script in LAUNCHERS.items() if shutil.which(program)]
    cure = "" if found else f"to start runs elsewhere, install one of {', '.join(LAUNCHERS)}"
    return Finding("launch scripts", ", ".join(found) or "none can run here", "ok" if found else "note", cure)


def _records(folder: Place) -> Iterator[Finding]:
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


def _texts(path: Place, records: Place | None) -> Iterator[Finding]:
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
    from pathflip_jax.alignment import check_config
    from pathflip_jax.llm.training import check_language_config
    from pathflip_jax.settings import load_config

    try:
        if "lm" in (config := load_config(name)):
            check_language_config(config)
            return Finding(f"config {name}", f"a language stage that trains {config.lm.trains}", "ok")
        parameters = check_config(name)
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        return Finding(f"config {name}", str(error), "fault", "compare it with configs/align_base.py")
    return Finding(f"config {name}", f"a model of {parameters / 1e6:.1f} M parameters", "ok")
