"""`pathflip serve`: slides in a browser, with grounding of texts."""

import argparse
import sys

from pathflip_jax.commands.options import (
    RUN_HELP,
    add_grounding_options,
    add_writing_options,
    command,
    local_path,
    number,
    path_text,
    place,
)
from pathflip_jax.commands.slide_sources import add_encoding_options, add_fact_options, slide_reader
from pathflip_jax.llm.sampling import Sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "serve",
        _run,
        "pathflip serve slides --checkpoint runs/base",
        "pathflip serve --slides slides --records records --checkpoint runs/base",
        "pathflip serve --slides slides --features features --checkpoint runs/base --embeddings embeddings.parquet "
        "--language runs/lm2",
        "pathflip serve --records records --checkpoint runs/base --host 0.0.0.0 --port 8080",
        "pathflip serve --records records --checkpoint runs/base --public-name hub.example.org "
        "--root-path /user/me/proxy/8000 --frame-ancestors self",
    )
    _add_sources(parser)
    _add_address(parser)
    add_grounding_options(parser)
    add_writing_options(parser, max_tokens=256)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options for the slides shown and the runs queried."""
    parser.add_argument(
        "slide",
        type=local_path,
        nargs="?",
        metavar="SLIDES",
        help="folder of slide files, feature files and records, or one of these; slides without features are encoded "
        "while the viewer runs, also those that are added to the folder later",
    )
    parser.add_argument(
        "--slides",
        type=local_path,
        metavar="DIR",
        help="folder of slide files, where their features are elsewhere; slides without features are encoded as well",
    )
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--records", type=place, help="folder of records of these slides")
    source.add_argument(
        "--features", type=local_path, metavar="DIR", help="folder of feature files, instead of records"
    )
    parser.add_argument(
        "--embeddings",
        type=local_path,
        metavar="FILE",
        help="file written by `pathflip embed`, so that search covers all slides from the start",
    )
    parser.add_argument(
        "--language",
        type=place,
        metavar="RUN",
        help="run folder of the language stage, or hf://OWNER/NAME, for reports and answers",
    )
    parser.add_argument(
        "--decoder", type=path_text, default="", metavar="FOLDER", help="folder of its decoder, if it has moved"
    )
    parser.add_argument(
        "--aligner", type=path_text, default="", metavar="RUN", help="run folder of its aligner, if it has moved"
    )
    add_fact_options(parser)
    add_encoding_options(parser)


def _add_address(parser: argparse.ArgumentParser) -> None:
    """Add the options for the listening address, and the proxies and pages in front of it."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: only this machine has access)"
    )
    parser.add_argument(
        "--port", type=number("port"), default=8000, help="port to listen on (default 8000; 0: any free one)"
    )
    parser.add_argument(
        "--token",
        help="access token that visitors must present (default: none on this machine; generated for any other --host)",
    )
    parser.add_argument(
        "--public-name",
        action="append",
        default=[],
        metavar="NAME",
        help="host name under which a proxy serves the viewer (may be repeated)",
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="path under which a proxy serves the viewer",
    )
    parser.add_argument(
        "--proxy-headers",
        nargs="*",
        metavar="ADDRESS",
        help="trust X-Forwarded-Host, -Proto, -Prefix from proxies at these addresses (with no ADDRESS: this machine)",
    )
    parser.add_argument(
        "--frame-ancestors",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins whose pages may embed the viewer in a frame: self, https://hub.example.org (default: none)",
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from pathflip_jax.viewer.access import choose_token
        from pathflip_jax.viewer.proxy import read_proxy
        from pathflip_jax.viewer.server import listen, run
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("starlette", "uvicorn"):
            raise
        raise ImportError(f"the viewer needs {name}: pip install pathflip-jax[viewer]") from None
    _check_sources(options)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 0 to 65535")
    proxy = read_proxy(options.public_name, options.root_path, options.proxy_headers, options.frame_ancestors)
    token = choose_token(options.host, options.token)
    listener = listen(options.host, options.port)  # first: a port in use is reported before the model is loaded

    from pathflip_jax.data.records.records import Records
    from pathflip_jax.inference.load import load
    from pathflip_jax.viewer.grounder import Grounder
    from pathflip_jax.viewer.pictures import Pictures
    from pathflip_jax.viewer.search import Search, read_slide_embeddings
    from pathflip_jax.viewer.session import Session

    with listener:
        records = None if options.records is None else Records(options.records)
        slides = _slides(options, records)
        predictor = load(options.checkpoint)
        if records is not None:
            predictor.check_records(records)
        found = {} if options.embeddings is None else read_slide_embeddings(options.embeddings, predictor, slides)
        speaker = None
        if options.language is not None:
            from pathflip_jax.inference.assistant import load_assistant
            from pathflip_jax.viewer.speaker import Speaker

            assistant = load_assistant(options.language, decoder=options.decoder, aligner=options.aligner)
            speaker = Speaker(assistant, Sampling.from_options(vars(options)))
        grounder, search = Grounder(predictor, options.method, options.window), Search(slides, found)
        intake = _intake(options, predictor, slides, search)
        run(Session(slides, Pictures(), grounder, search, speaker, intake), listener, token, proxy)
    return 0


def _check_sources(options: argparse.Namespace) -> None:
    apart = [name for name in ("slides", "records", "features") if getattr(options, name) is not None]
    if options.slide is None and not apart:
        raise ValueError(
            "nothing to show: pass a folder of slides, or --slides, --records or --features where they are apart"
        )
    if options.slide is not None and apart:
        raise ValueError(
            f"{options.slide} and --{apart[0]}: pass one folder of everything, or the parts by --slides and --records "
            "or --features"
        )


def _slides(options: argparse.Namespace, records) -> list:
    """Slides to show, those of one folder or of its parts; a folder that is still empty has none."""
    from pathflip_jax.inference.sources import find_sources
    from pathflip_jax.viewer.slides import list_slides

    if options.slide is None:
        return list_slides(options.slides, records=records, features=options.features)
    if options.slide.is_dir() and not any(options.slide.iterdir()):
        return []
    given = {"patch_size": options.patch_size, "mpp": options.mpp}
    found = find_sources(options.slide, {name: value for name, value in given.items() if value is not None})
    for failure in found.failed:
        print(f"slide {failure.slide} is not shown: {failure.error}", file=sys.stderr)
    return found.slides


def _intake(options: argparse.Namespace, predictor, slides: list, search):
    """Encoder of slides without features, and watcher of the folder of slide files."""
    from pathflip_jax.viewer.intake import Intake

    reader, refusal = slide_reader(options, predictor), ""
    try:
        reader.check()
    except (ValueError, OSError, ImportError) as error:
        reader, refusal = None, str(error)
        if any(slide.features is None for slide in slides):
            print(f"slides without features are shown, but not encoded: {error}", file=sys.stderr)
    folder = options.slide or options.slides
    return Intake(slides, reader, folder if folder and folder.is_dir() else None, refusal, search.add)
