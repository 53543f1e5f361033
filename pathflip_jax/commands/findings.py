"""Findings of `pathflip doctor`; a check that crashes yields a finding too, and does not stop the others."""

import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Finding(NamedTuple):
    """Result of a check: its name, what was found, its state (`ok`, `note` or `fault`), and the cure."""

    name: str
    found: str
    state: str
    cure: str = ""


def guarded(name: str, check: Callable[..., Iterable[Finding]], *arguments) -> list[Finding]:
    """Findings of a check; an unexpected error is a fault among them, and other checks still run."""
    found = []
    try:
        for finding in check(*arguments):
            found.append(finding)
    except (Exception, SystemExit) as error:
        if os.environ.get("PATHFLIP_DEBUG"):
            traceback.print_exc()
        lines = str(error).splitlines() or ["no message"]
        cure = "set PATHFLIP_DEBUG=1 to see the traceback; if a package is at fault, reinstall it"
        found.append(Finding(name, f"{type(error).__name__}: {lines[0]}", "fault", cure))
    return found


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this package logs within the block, instead of printing them to stderr."""
    log, messages = logging.getLogger("pathflip_jax"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    propagates, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.propagate = propagates


def print_findings(findings: list[Finding]) -> None:
    """Print each finding with its cure below it, then the number of faults."""
    width = max(len(finding.name) for finding in findings)
    for name, found, state, cure in findings:
        print(f"{state:5}  {name:{width}}  {found}")
        if cure:
            print(f"{'':5}  {'':{width}}  -> {cure}")
    faults = sum(finding.state == "fault" for finding in findings)
    print(f"\n{faults} faults." if faults != 1 else "\n1 fault.")
