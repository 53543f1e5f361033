"""Parser of the repository's Markdown pages: code blocks, commands, links and headings."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}(?! ).*\n)+", re.MULTILINE)
LAUNCHED = re.compile(r"launch/\w+\.sh")


class Command(NamedTuple):
    """A command of a page; `whole` if it is in a code block and complete, without `...`."""

    program: str
    arguments: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", text)


def inline_code(text: str) -> list[str]:
    """Code within sentences and tables, each on one line."""
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def code_lines(text: str) -> list[str]:
    """The lines of shell blocks, continued lines joined."""
    blocks = [code for language, code in FENCED.findall(text) if language in ("", "bash", "sh")]
    blocks += [re.sub(r"^    ", "", code, flags=re.MULTILINE) for code in INDENTED.findall(prose(text))]
    return [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]


def _command(line: str, in_block: bool) -> Command | None:
    try:
        words = shlex.split(line, comments=in_block)
    except ValueError:  # not a shell command, e.g. the configuration of a server
        return None
    words = words[: words.index("|")] if "|" in words else words
    for place, word in enumerate(words):
        if word.rpartition("/")[2] in ("pathflip", "python", "python3") or LAUNCHED.search(word):
            program = word if LAUNCHED.search(word) else word.rpartition("/")[2]
            rest = tuple(word for word in words[place + 1 :] if word != "...")
            return Command(program, rest, in_block and "..." not in words) if rest else None
        if not ("=" in word or word in ("srun", "taskset", "-c") or word.isdigit()):
            return None
    return None


def commands(text: str) -> list[Command]:
    """Every command of `pathflip`, `python` or a launch script, in blocks and in sentences."""
    found = [_command(line, True) for line in code_lines(text)]
    found += [_command(code, False) for code in inline_code(text) if "://" not in code.split()[0]]
    return [command for command in found if command is not None]


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(text)))


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation left out, blanks as hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.add(anchor)
    return found
