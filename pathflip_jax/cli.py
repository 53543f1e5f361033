"""The `pathflip` command: one subcommand per job (`commands/`).

Exit codes: 0 done; 1 done, but some slides failed (the list says which); 2 wrong input, with the cure;
75 stopped by a signal after saving, or ended by a hang or a lost host, to be started again (schedulers know this as
"temporary failure").
"""

import argparse
import os
import sys
from pathlib import Path

from pathflip_jax.commands import COMMANDS
from pathflip_jax.commands.options import WRONG_INPUT
from pathflip_jax.compilation import keep_compiled
from pathflip_jax.data.storage import is_url

RESEARCH_ONLY = "For research use only: not a medical device, not for diagnosis."


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options; every one has an example in its --help."""
    parser = argparse.ArgumentParser(
        prog="pathflip", description=f"Vision-language models for whole slide images. {RESEARCH_ONLY}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _refuse_urls(options: argparse.Namespace, argv: list[str]) -> None:
    """Raise ValueError for a URL where a local path belongs: pathlib would make a folder called "gs:" of it."""
    given = [value for values in vars(options).values() for value in (values if isinstance(values, list) else [values])]
    for url in (text.partition("=")[2] if text.startswith("--") else text for text in argv):
        if is_url(url) and Path(url) in given:
            raise ValueError(f"{url}: a local path is needed here; records, reports and slide tables may be URLs")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; wrong input becomes one clear line on stderr (PATHFLIP_DEBUG=1 shows the traceback)."""
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    try:
        if argv[:1] == ["train"]:
            from pathflip_jax.train import main as train_main

            return train_main(argv[1:])
        options = build_parser().parse_args(argv)
        _refuse_urls(options, argv)
        options.command_line = argv
        return options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("PATHFLIP_DEBUG"):
            raise
        print(f"pathflip: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("pathflip: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
