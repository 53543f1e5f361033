"""Code shared by the commands: their declaration, common options, and printing of results."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pathflip_jax.commands import COMMANDS, FAILED_SLIDES
from pathflip_jax.data.storage.files import Place, as_path
from pathflip_jax.data.storage.paths import expand
from pathflip_jax.evaluate.spec import (
    FILE,
    FLAG,
    NUMBER,
    PLACE,
    PROMPTS,
    SPEC_OPTIONS,
    TEXT,
    EvaluationSpec,
    Option,
    option_name,
)
from pathflip_jax.grounding.methods import METHODS
from pathflip_jax.inference.families import method_help
from pathflip_jax.runs import bundled
from pathflip_jax.runs.bounds import OPTIONS

RUN_HELP = "run folder, hf://OWNER/NAME[@REVISION] on the Hugging Face hub" + "".join(
    f", or {name}, which comes with the package" for name in bundled.names()
)


def command(commands, name: str, run, *examples: str) -> argparse.ArgumentParser:
    """Declare a command of `COMMANDS`, implemented by `run(options)`; each example is a complete command line."""
    summary = COMMANDS[name]
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _shard(text: str) -> tuple[int, int]:
    try:
        number, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, such as 0/8") from None
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I from 0 to N - 1")
    return number, count


def place(text: str) -> Place:
    """Local path or URL, for argparse; `~` and environment variables of a path are expanded."""
    try:
        return as_path(expand(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_text(text: str) -> str:
    """Expanded path as text, for argparse."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """Expanded local path, for argparse."""
    return Path(path_text(text))


def number(option: str) -> Callable[[str], float]:
    """Number within the bounds of an option, for argparse."""
    bound = OPTIONS[option]

    def read(text: str) -> float:
        try:
            value = int(text) if bound.whole else float(text)
        except ValueError:
            value = None
        if value is None or not bound.holds(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {bound.words(value)}")
        return value

    return read


def add_spec_options(parser: argparse.ArgumentParser, options: Mapping[str, Option]) -> None:
    """Add options for the fields of a specification; omitted options are absent from the parsed namespace."""
    types = {PLACE: place, FILE: local_path, PROMPTS: local_path, TEXT: None}
    groups: dict[str, argparse._ArgumentGroup | argparse.ArgumentParser] = {"": parser}
    for field, option in options.items():
        name = option_name(field)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        more = {"metavar": option.metavar, "nargs": option.many or None, "choices": option.choices or None}
        if option.kind == FLAG:
            more = {"action": "store_true"}
        else:
            more["type"] = number(name) if option.kind == NUMBER else types[option.kind]
        help_text = option.help.replace("%", "%%")
        groups[option.group].add_argument(f"--{name}", default=argparse.SUPPRESS, help=help_text, **more)


def add_export_options(parser: argparse.ArgumentParser, condition: str = "") -> None:
    """Add the options for the weights and the model card of an export; `condition` begins the help of the card's."""
    parser.add_argument(
        "--which", choices=["best", "latest"], default="best", help="checkpoint to export (default best)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="type of the weights written (default float32); float16 halves the files of an alignment run",
    )
    parser.add_argument(
        "--scores",
        type=local_path,
        metavar="DIR",
        help=f"{condition}folder of the evaluation whose scores the model card shows",
    )
    parser.add_argument(
        "--encoder-licence",
        metavar="TEXT",
        help=f"{condition}licence of the patch encoder, if pathflip does not know it",
    )
    parser.add_argument(
        "--about",
        type=local_path,
        metavar="FILE",
        help=f"{condition}Markdown for the model card about the training data: patients, scanners, licence",
    )
    for part in ("decoder", "aligner"):
        help = f"for a language run: folder of its {part}, if it has moved since training"
        parser.add_argument(f"--{part}", type=path_text, default="", metavar="FOLDER", help=help)


def add_records_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by `prepare` and `import`: output folder, regions, distribution of the work."""
    parser.add_argument("--out", type=place, required=True, metavar="RECORDS", help="folder to write the records to")
    parser.add_argument(
        "--cut",
        choices=["grid", "scan"],
        default="grid",
        help="cut slides into regions as a grid of squares (default), or as runs of consecutive patches in file order",
    )
    parser.add_argument(
        "--edge-um",
        type=number("edge-um"),
        default=2048.0,
        metavar="UM",
        help="edge length of a square region in micrometres (default 2048)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16"],
        default="float16",
        help="dtype of the stored features (default float16)",
    )
    parser.add_argument(
        "--slides",
        type=place,
        metavar="CSV",
        help="slide table with columns slide_id and patient_id, which assigns the slides to cases; its columns mpp and "
        "magnification, if any, override the resolution stated in the files of single slides",
    )
    parser.add_argument(
        "--override-mpp",
        type=number("override-mpp"),
        metavar="UM",
        help="level-0 micrometres per pixel of all slides; overrides what their files state",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove from the records all slides whose files are not in the input folder",
    )
    _add_distribution_options(parser)


def _add_distribution_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the distribution of slides over jobs, files and processes, and for bad slides."""
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="process only share I of N, counted from 0, for job arrays (default 0/1)",
    )
    parser.add_argument(
        "--slides-per-shard",
        type=number("slides-per-shard"),
        default=32,
        metavar="N",
        help="slides per shard file (default 32)",
    )
    parser.add_argument(
        "--workers",
        type=number("workers"),
        metavar="N",
        help="worker processes, which share the machine and its GPUs (default: number of cores)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="distribute the slides with Apache Beam (needs the extra [beam]); everything after --beam is passed to "
        "Beam, which uses its DirectRunner unless a runner is named. Every machine must see the slides and RECORDS "
        "under the same paths",
    )


def add_fold_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the fold of a slide table."""
    help = "fold of a slide table that holds several, as the k=all.tsv of Patho-Bench: 0 or fold_0"
    parser.add_argument("--fold", metavar="K", help=help)


def add_shared_options(parser: argparse.ArgumentParser, *fields: str) -> None:
    """Add options of `evaluate` to another command, by their field in `EvaluationSpec`, with the same defaults."""
    add_spec_options(parser, {field: SPEC_OPTIONS[field]._replace(group="") for field in fields})
    parser.set_defaults(**{field: getattr(EvaluationSpec, field) for field in fields})


def add_grounding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for mapping a text on patches, shared by `ground`, `report` and `serve`."""
    parser.add_argument("--method", choices=list(METHODS), help=method_help())
    add_shared_options(parser, "window")


def add_writing_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options of greedy decoding and beam search."""
    parser.add_argument(
        "--max-tokens",
        type=number("max-tokens"),
        default=max_tokens,
        metavar="N",
        help=f"maximum number of tokens to generate (default {max_tokens})",
    )
    add_shared_options(parser, "min_tokens", "beams", "length_penalty", "repetition_penalty")


def add_language_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options of generation, sampling included."""
    add_writing_options(parser, max_tokens)
    parser.add_argument(
        "--temperature",
        type=number("temperature"),
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 (default): no sampling",
    )
    parser.add_argument(
        "--top-k", type=number("top-k"), metavar="K", help="sample from the K most likely tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=number("top-p"),
        default=1.0,
        metavar="P",
        help="nucleus sampling: sample from the most likely tokens of total probability P (default 1: all)",
    )
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of sampling (default 0)")


def beam_examples(command: str) -> list[str]:
    """Examples of a command on Apache Beam: in local processes, on a Flink cluster, on Dataflow."""
    shared = f"pathflip {command} --out /mnt/records --beam"
    flink = "--runner=FlinkRunner --flink_master=HOST:8081"
    dataflow = "--runner=DataflowRunner --project=P --region=us-central1 --temp_location=gs://B/temp"
    return [
        f"{shared} --direct_running_mode=multi_processing --direct_num_workers=4",
        f"{shared} {flink} --environment_type=DOCKER --environment_config=IMAGE",
        f"{shared} {dataflow} --sdk_container_image=IMAGE --number_of_worker_harness_threads=1",
    ]


def records_settings(options: argparse.Namespace) -> dict:
    """Settings from the options of `add_records_options`."""
    names = (
        "cut",
        "edge_um",
        "dtype",
        "override_mpp",
        "shard",
        "slides_per_shard",
        "workers",
        "strict",
        "prune",
        "beam",
    )
    return {name: getattr(options, name) for name in names} | {"slides_table": options.slides}


def print_records_report(report, as_json: bool) -> int:
    """Print the outcome of `prepare` or `import`, with notes on single slides; returns the exit code."""
    return print_report(report, as_json, **_records_entries(report))


def print_records_reports(reports: Mapping[str, Any], as_json: bool) -> int:
    """Print the outcomes of `prepare` with several encoders, by their names; returns the exit code."""
    if as_json:
        print(json.dumps({name: _outcome(report) | _records_entries(report) for name, report in reports.items()}))
    else:
        *others, last = reports.values()  # all have the use of the devices, which they shared
        print("\n".join([*(replace(report, device=None).summary() for report in others), last.summary()]))
    return FAILED_SLIDES if any(report.failed for report in reports.values()) else 0


def print_report(report, as_json: bool, **more) -> int:
    """Print the outcome of a job over many slides, as text or as JSON with `more` entries; returns the exit code."""
    if as_json:
        print(json.dumps(_outcome(report) | more))
    else:
        print(report.summary())
    return FAILED_SLIDES if report.failed else 0


def _outcome(report) -> dict[str, Any]:
    failed = [failure._asdict() for failure in report.failed]
    return {"done": report.done, "skipped": report.skipped, "failed": failed}


def _records_entries(report) -> dict[str, Any]:
    found = {"absent": [row._asdict() for row in report.absent], "notes": report.notes}
    return found if report.device is None else found | {"device": report.device.as_json()}
