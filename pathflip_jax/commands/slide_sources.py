"""Slides from any source for the commands that answer about them: options, reading, and those left out."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pathflip_jax.commands import FAILED_SLIDES
from pathflip_jax.commands.options import local_path, number, path_text, place
from pathflip_jax.data.storage.failures import Failure, list_failures


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for slides of any kind, shared by the commands that answer about slides."""
    parser.add_argument(
        "slide",
        type=place,
        metavar="SLIDE",
        help="slide file, DICOM series, feature file, folder of records, or folder of any of these",
    )
    parser.add_argument(
        "--slide-id",
        action="append",
        metavar="ID",
        help="slide to read from a folder of several (may be repeated; default: all)",
    )
    add_encoding_options(parser)


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for slides that must be encoded before the run can read them."""
    group = parser.add_argument_group("slides without features", "They are encoded as the run's own slides were.")
    group.add_argument(
        "--weights",
        type=local_path,
        metavar="PATH",
        help="file or folder of the weights of the run's patch encoder (default: from the Hugging Face hub or its "
        "cache)",
    )
    group.add_argument(
        "--cache",
        type=local_path,
        metavar="DIR",
        help="folder in which encoded slides are kept for the next command (default: $PATHFLIP_CACHE, else "
        "~/.cache/pathflip_jax/slides)",
    )
    group.add_argument(
        "--cache-size",
        type=number("cache-size"),
        default=50.0,
        metavar="GB",
        help="size of the cache; slides used least recently are removed beyond it (default 50)",
    )
    group.add_argument(
        "--hash-whole-files",
        action="store_true",
        help="recognise slides in the cache by all of their bytes, not only by size, time, head and tail",
    )
    group.add_argument(
        "--min-tissue",
        type=number("min-tissue"),
        default=0.25,
        help="minimum tissue fraction of a patch (default 0.25)",
    )
    group.add_argument(
        "--keep-ink", action="store_true", help="keep pen marks as tissue, for stains that resemble them"
    )
    group.add_argument(
        "--workers",
        type=number("workers"),
        metavar="N",
        help="processes that read slides (default: number of cores)",
    )


def add_fact_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for facts that a slide file, a feature file or the run may lack."""
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        metavar="PX",
        help="edge length of a patch in level-0 pixels, if neither its file nor the run states it",
    )
    parser.add_argument(
        "--mpp", type=number("mpp"), metavar="UM", help="level-0 micrometres per pixel, if its file does not state it"
    )


def slide_reader(options: argparse.Namespace, predictor):
    """Reader of slides for a run, from the options of `add_source_options` and `add_fact_options`."""
    from pathflip_jax.inference.reading import ReadingSettings, SlideReader

    settings = ReadingSettings(
        cache=options.cache,
        cache_bytes=options.cache_size * 1e9,
        whole_files=options.hash_whole_files,
        weights=options.weights,
        workers=options.workers,
        patch_size=getattr(options, "patch_size", None),
        mpp=getattr(options, "mpp", None),
        min_tissue=options.min_tissue,
        keep_ink=options.keep_ink,
    )
    return SlideReader(predictor, settings)


def print_failures(failed: Sequence[Failure]) -> int:
    """Print the slides that were left out to stderr; returns the exit code."""
    if failed:
        print("\n".join(["slides left out:", *list_failures(failed)]), file=sys.stderr)
    return FAILED_SLIDES if failed else 0


def add_slide_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for slides and the run, shared by `caption` and `ask`."""
    add_source_options(parser)
    add_fact_options(parser)
    parser.add_argument(
        "--checkpoint",
        type=place,
        required=True,
        metavar="RUN",
        help="run folder of the language stage, or hf://OWNER/NAME, a repository on the Hugging Face hub",
    )
    parser.add_argument(
        "--decoder", type=path_text, default="", metavar="FOLDER", help="folder of the decoder, if it has moved"
    )
    parser.add_argument(
        "--aligner", type=path_text, default="", metavar="RUN", help="run folder of the aligner, if it has moved"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="",
        help="dtype of the decoder's weights (default: as trained)",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


class SlideRows(NamedTuple):
    """Slide for a language model: its id, and its rows [slide; regions] of the aligner."""

    slide_id: str
    rows: Any


def read_slide_rows(options: argparse.Namespace, failed: list[Failure]) -> tuple[Any, Iterator[SlideRows], bool]:
    """Load the assistant, and read the slides of `add_slide_options` for it, one after the other.

    Returns the assistant, an iterator of `SlideRows`, and whether one slide alone was asked for. Slides that cannot be
    read are added to `failed`, or raise where one alone was asked for.
    """
    from pathflip_jax.inference.assistant import load_assistant

    assistant = load_assistant(
        options.checkpoint, decoder=options.decoder, aligner=options.aligner, dtype=options.dtype
    )
    reader = slide_reader(options, assistant.predictor)
    found = reader.find(options.slide, options.slide_id)
    alone = len(found.slides) + len(found.failed) == 1
    failed += found.failed

    def rows() -> Iterator[SlideRows]:
        for source, slide in reader.read_each(found.slides, failed):
            try:
                embedded = assistant.embed_slides([slide])[0]
            except (ValueError, OSError) as error:
                failed.append(Failure(source.slide_id, str(source.place or source.image), str(error)))
                continue
            yield SlideRows(slide.slide_id, embedded)
        if alone and failed:
            raise ValueError(failed[0].error)

    return assistant, rows(), alone
