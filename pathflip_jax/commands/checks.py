"""Checks of `pathflip doctor`: the machine, the data and the configs, each fault with its cure.

An experiment that fails after a night in the queue usually fails on something that could have been checked beforehand:
a package, a device, a folder of records with one bad byte, a table with other slide ids, a missing vocabulary.
"""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from pathflip_jax.commands.findings import Finding, guarded
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.texts.split_files import SlideTableFile
from pathflip_jax.runtime import limits, ulimits

# Packages, and the module of each.
CORE = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax",
    "grain": "grain",
    "tensorflow-datasets": "tensorflow_datasets",
    "tokenizers": "tokenizers",
}
SLIDES = {
    "openslide-python": "openslide",
    "openslide-bin": "openslide_bin",
    "scikit-image": "skimage",
    "h5py": "h5py",
}
# Packages of each extra: name, module and purpose.
EXTRAS = {
    "torch": ("torch", "torch", "read and write PyTorch checkpoints other than .safetensors"),
    "gcs": ("gcsfs", "gcsfs", "read and write records in Google Cloud Storage, gs://"),
    "s3": ("s3fs", "s3fs", "read and write records in Amazon S3 and compatible storage, s3://"),
    "aot": ("libtpu", "libtpu", "compile for absent TPUs: memory, traffic and scaling of a pod (benchmarks/aot.py)"),
    "encoders": ("timm", "timm", "encode patches with timm and Hugging Face vision models"),
    "survival": ("scikit-survival", "sksurv", "score survival: pathflip evaluate --survival-time"),
    "viewer": ("starlette", "starlette", "show slides in a browser: pathflip serve"),
    "profile": ("xprof", "xprof", "view the traces of `pathflip train --profile`"),
    "wandb": ("wandb", "wandb", "log to Weights & Biases (train.wandb_project)"),
    "beam": ("apache-beam", "apache_beam", "prepare slides on a cluster with Apache Beam"),
}
# Program needed by each script of launch/.
LAUNCHERS = {"gcloud": "tpu.sh", "xpk": "xpk.sh", "nvidia-smi": "gpus.sh", "sbatch": "slurm.sh", "kubectl": "jobset.sh"}
UNSHADOW = "rename it, start in another folder, or remove the folder that contains it from PYTHONPATH"
MIN_DISK_GB, MIN_MEMORY_GB = 10, 8
MIN_OPEN_FILES, MIN_SHARED_BYTES = 1024, 1 << 29  # NCCL needs some tens of megabytes of shared memory per process


def examine(
    *,
    records: Place | None = None,
    slides: SlideTableFile | None = None,
    texts: Place | None = None,
    tokenizer: Place | None = None,
    configs: Sequence[str] = (),
) -> list[Finding]:
    """Check the machine and the given data and configs; nothing is modified, and no failed check stops the others."""
    checks = {
        "versions": _versions,
        "devices": _devices,
        "launcher": _launcher,
        "launch scripts": _launchers,
        "room": _room,
        "file reader": _reader,
        "offline": _offline,
        "patch encoders": _encoders,
    }
    findings = [finding for name, check in checks.items() for finding in guarded(name, check)]
    if not all(place is None for place in (records, slides, texts, tokenizer)):
        findings += guarded("data", _data, records, slides, texts, tokenizer)
    for config in configs:
        findings += guarded(f"config {config}", _config, config)
    return findings


def _data(*places: SlideTableFile | None) -> list[Finding]:
    from pathflip_jax.commands.data_checks import examine_data

    return examine_data(*places)


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    supported = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"), ("3", "13"))
    yield Finding(
        "python", python, "ok" if supported else "fault", "" if supported else "use Python 3.11, 3.12 or 3.13"
    )
    for package, module in {**CORE, **SLIDES}.items():
        cure = "run `make setup`, or reinstall with `pip install pathflip-jax`"
        yield from guarded(package, _package, package, package, module, "fault", cure)
    for extra, (package, module, purpose) in EXTRAS.items():
        cure = f"run `pip install pathflip-jax[{extra}]` to {purpose}"
        yield from guarded(f"extra [{extra}]", _package, f"extra [{extra}]", package, module, "note", cure)


def _package(name: str, package: str, module: str, state: str, cure: str) -> Iterator[Finding]:
    """Version of a package, or the module that shadows it; `state` and `cure` apply if it is not installed.

    A folder or file of the same name earlier on Python's path shadows it: W&B leaves a folder `wandb` behind.
    """
    spec = importlib.util.find_spec(module)
    places = []
    if spec is not None:
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        if places:
            yield Finding(name, f"not installed; {places[0]} is imported instead", state, f"{cure}; {UNSHADOW}")
        else:
            yield Finding(name, "not installed", state, cure)
        return
    home = Path(str(installed.locate_file(""))).resolve()
    editable = '"editable": true' in (installed.read_text("direct_url.json") or "")  # its files are elsewhere
    if not places:
        yield Finding(name, f"{installed.version}, but {module} cannot be imported", "fault", f"reinstall {package}")
    elif editable or any(Path(place).resolve().is_relative_to(home) for place in places):
        yield Finding(name, installed.version, "ok")
    else:
        yield Finding(name, f"{places[0]} is imported instead of {package} {installed.version}", "fault", UNSHADOW)


def _devices() -> Iterator[Finding]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield Finding("devices", str(error).splitlines()[0], "fault", "check JAX_PLATFORMS and the device driver")
        return
    kinds = sorted({device.device_kind for device in devices})
    yield Finding("devices", f"{len(devices)} x {', '.join(kinds)} ({devices[0].platform})", "ok")
    if devices[0].platform != "cpu":
        yield _utilisation(devices[0].device_kind)
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        yield Finding(
            "gpu", "this machine has a GPU, but JAX does not use it", "fault", "run `pip install pathflip-jax[gpu]`"
        )


def _utilisation(kind: str) -> Finding:
    from pathflip_jax.monitoring.telemetry import PEAK_BFLOAT16

    if kind in PEAK_BFLOAT16:
        return Finding(
            "utilisation", f"relative to a peak of {PEAK_BFLOAT16[kind] / 1e12:g} TFLOP/s in bfloat16 per {kind}", "ok"
        )
    cure = "add its peak bfloat16 FLOP/s to PEAK_BFLOAT16 in pathflip_jax/monitoring/telemetry.py"
    return Finding("utilisation", f"not reported in training: no peak FLOP/s on record for {kind}", "note", cure)


def _launcher() -> Iterator[Finding]:
    """Distributed launch that `pathflip train` would join if it were started in the same way as this command."""
    from pathflip_jax.runtime.distributed import find_launch
    from pathflip_jax.runtime.launchers import SWITCH, explain_single_process

    try:
        launch = find_launch()
    except ValueError as error:
        yield Finding("launcher", str(error), "fault", f"correct that, or set {SWITCH}=0 to train in one process")
        return
    if launch is None:
        yield Finding("launcher", f"none: {explain_single_process() or 'one process trains alone'}", "ok")
        return
    yield Finding("launcher", f"process {launch.process} of {launch.processes}, found by {launch.found_by}", "ok")


def _room() -> Iterator[Finding]:
    memory, cores = limits.memory_limit(), limits.processors()
    if memory is None:  # not Linux: total memory of the machine
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gb = memory / 2**30
    cure = f"training needs about {MIN_MEMORY_GB} GB: use a smaller batch" if gb < MIN_MEMORY_GB else ""
    yield Finding("memory", f"{gb:.3g} GB, {cores} cores for this process", "note" if cure else "ok", cure)
    files = ulimits.open_files()
    cure = f"cohorts of many shards need more: run `ulimit -n {ulimits.OPEN_FILES}`" if files < MIN_OPEN_FILES else ""
    yield Finding("open files", f"at most {files} at a time", "note" if cure else "ok", cure)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < MIN_SHARED_BYTES:
        cure = "processes with one GPU each need more to exchange gradients: use `docker run --shm-size=8g`"
        yield Finding("shared memory", f"{size / 1e6:.3g} MB in {shared}", "note", cure)
    free = shutil.disk_usage(".").free / 2**30
    cure = "records and checkpoints need more space: free some, or work on another disk" if free < MIN_DISK_GB else ""
    yield Finding("disk", f"{free:.0f} GB free here", "note" if cure else "ok", cure)


def _reader() -> Iterator[Finding]:
    """Check that the isolated process for parsing HDF5, .pt and slide files can start."""
    from pathflip_jax.data.readers import guarded

    try:
        guarded.parse("pathflip_jax.data.readers.slide_pixels:detect", Path(__file__))
    except (ValueError, OSError, ImportError) as error:
        cure = "feature files and slides are parsed in a separate process: allow this user to start Python"
        yield Finding("file reader", str(error), "fault", cure)
        return
    limits = "memory and time" if Path("/proc/self/statm").exists() else "time; this system does not limit memory"
    yield Finding("file reader", f"runs in a separate process, with limits on {limits}", "ok")


def _offline() -> Iterator[Finding]:
    """Hugging Face models in the cache, which load without a network; the check downloads nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = sorted(path.name[8:].replace("--", "/") for path in Path(HF_HUB_CACHE).glob("models--*"))
    if cached:
        yield Finding("offline", f"cached models: {', '.join(cached)}", "ok")
    else:
        yield Finding(
            "offline",
            "no Hugging Face model is cached",
            "note",
            "before going offline, download a BERT folder (config.json, vocab.txt, model.safetensors) and set "
            "config.data.tokenizer and config.model.bert to it; without one, train a small vocabulary with "
            "`pathflip vocabulary`",
        )


def _encoders() -> Iterator[Finding]:
    """Registered patch encoders whose weights are in the Hugging Face cache."""
    from data_prep.hub import cached
    from pathflip_jax.vision.recipes import RECIPES

    here = [name for name, recipe in RECIPES.items() if cached(recipe) is not None]
    cure = (
        "before going offline, download the weights of an encoder that `pathflip encoders` lists (`hf download "
        "REPOSITORY FILE --local-dir FOLDER`) and pass the folder to `pathflip prepare --weights`"
    )
    found = f"weights cached: {', '.join(here)}" if here else "the weights of none are cached"
    yield Finding("patch encoders", found, "ok" if here else "note", "" if here else cure)


def _launchers() -> Iterator[Finding]:
    found = [f"launch/{script} ({program})" for program, script in LAUNCHERS.items() if shutil.which(program)]
    cure = "" if found else f"to start runs on other machines, install one of {', '.join(LAUNCHERS)}"
    yield Finding(
        "launch scripts", ", ".join(found) or "none of their programs is installed", "ok" if found else "note", cure
    )


def _config(name: str) -> Iterator[Finding]:
    from pathflip_jax.settings.kinds import LanguageSettings
    from pathflip_jax.training.alignment import count_parameters
    from pathflip_jax.training.language import check_language_settings
    from pathflip_jax.training.settings import freeze, load_config

    try:
        settings = freeze(load_config(name))
        if isinstance(settings, LanguageSettings):
            check_language_settings(settings)
            yield Finding(f"config {name}", f"language stage, training {settings.lm.trains}", "ok")
            return
        parameters = count_parameters(settings)
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        cure = "run `pathflip train --config align_base --help` to list the settings of alignment"
        yield Finding(f"config {name}", str(error), "fault", cure)
        return
    yield Finding(f"config {name}", f"a model of {parameters / 1e6:.1f} M parameters", "ok")
