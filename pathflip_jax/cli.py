"""The `pathflip` command, with one subcommand per job (`commands/`).

Exit codes: 0 success; 1 finished, but some slides failed (they are listed); 2 invalid input, with a message that names
the cure; 75 training stopped by a signal after saving, or by a hang or a lost host: start it again (schedulers know
this code as "temporary failure").
"""

import argparse
import difflib
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from pathflip_jax.commands import COMMANDS, WRONG_INPUT, add_command
from pathflip_jax.data.storage.paths import refuse_undecodable
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.runtime import streams, ulimits
from pathflip_jax.runtime.compilation import enable_compilation_cache

RESEARCH_ONLY = "For research use only: not a medical device, not for diagnosis."


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an unknown option with the usage of its command and the closest valid option.

    argparse itself passes unknown options of a command up to `pathflip`, whose usage shows none of that command's
    options.
    """

    _given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        """Parsed options, as from argparse, except that unknown arguments are an error of this command."""
        self._given = sys.argv[1:] if args is None else list(args)
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after printing the usage, the message and the closest valid names."""
        super().error("; ".join([message, *self._suggestions()]))

    def _suggestions(self) -> Iterator[str]:
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        options = self._option_string_actions
        for given in self._given:
            name = given.partition("=")[0]
            if commands and not given.startswith("-"):
                close = difflib.get_close_matches(name, commands[0], n=1)
                if close and name not in commands[0]:
                    yield f"did you mean {self.prog} {close[0]}?"
                return  # the rest belongs to the subcommand
            if name in options and options[name].nargs == argparse.REMAINDER:
                return
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                if close := difflib.get_close_matches(name, options, n=1, cutoff=0.7):
                    yield f"{name}: did you mean {close[0]}?"


def build_parser(wanted: Collection[str] = COMMANDS) -> argparse.ArgumentParser:
    """Parser of all subcommands; the --help of each shows an example.

    Only the `wanted` ones get their options, which are declared in their modules; the others are merely listed.
    """
    parser = Parser(prog="pathflip", description=f"Vision-language models for whole slide images. {RESEARCH_ONLY}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, summary in COMMANDS.items():
        if name in wanted:
            add_command(commands, name)
        else:
            commands.add_parser(name, help=summary)
    return parser


def _refuse_urls(options: argparse.Namespace, argv: list[str]) -> None:
    """Raise ValueError for a URL where a local path is expected: pathlib would create a folder called "gs:"."""
    given = [value for values in vars(options).values() for value in (values if isinstance(values, list) else [values])]
    for url in (text.partition("=")[2] if text.startswith("--") else text for text in argv):
        if is_url(url) and Path(url) in given:
            raise ValueError(f"{url}: a local path is needed here; records, reports and slide tables may be URLs")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; invalid input is reported in one line on stderr (PATHFLIP_DEBUG=1 shows the traceback)."""
    streams.keep_open()
    ulimits.raise_open_files()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as ended:  # raised by argparse
        ended.code = _flush_output(ended.code)
        raise
    return _flush_output(code)


def _run(argv: list[str]) -> int:
    try:
        refuse_undecodable(argv)
        if argv[:1] == ["train"]:
            enable_compilation_cache()  # before JAX is imported
            from pathflip_jax.training.loop import main as train_main

            return train_main(argv[1:])
        options = build_parser(argv[:1]).parse_args(argv)  # `pathflip` itself takes --help alone
        _refuse_urls(options, argv)
        options.command_line = argv
        enable_compilation_cache()
        return options.run(options)
    except Exception as error:
        limit = ulimits.explain(error)
        wrong_input = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, MemoryError))
        if os.environ.get("PATHFLIP_DEBUG") or not (wrong_input or limit):
            raise
        print(f"pathflip: {limit or error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("pathflip: interrupted", file=sys.stderr)
        return 130


def _flush_output(code: int | str | None) -> int | str | None:
    """Exit code after flushing all output; output lost to a full disk is an error."""
    try:
        streams.flush()
    except OSError as error:
        print(f"pathflip: {error}", file=sys.stderr)
        return code or WRONG_INPUT
    return code


if __name__ == "__main__":
    sys.exit(main())
