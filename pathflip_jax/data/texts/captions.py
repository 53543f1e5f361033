"""Sentence splitting of captions, and sampling of subcaptions (DESIGN section 5).

The region loss aligns subcaptions with regions, so a sentence split in the middle ("0.8" and "cm from the margin")
would be a wrong target. Pathology reports are full of periods that do not end a sentence: decimals, "vs.", "No. 3",
"Fig. 2", "N.S.A.B.P.", initials, list numbers. A period ends a sentence only where all of these are ruled out; in doubt
two sentences stay together, at the cost of one longer subcaption.
"""

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Never the end of a sentence, whatever follows.
_ABBREVIATIONS = set(
    "vs e.g i.e eg ie cf ca approx resp incl dr mr mrs ms prof st fig figs tab eq ref refs sect vol viz".split()
)
# End of a sentence unless a number (of a node, a block, a page) follows.
_BEFORE_NUMBERS = set("no nos nr pp p ed pt".split())
# Words that begin sentences and are not surnames: "hepatitis B. The", but "J. Smith".
_STARTERS = set(
    "the a an this that these those there it its in on of at no not all both each one two three four five six other "
    "additional additionally further furthermore however overall importantly notably also while although as with and "
    "neither residual margins margin surgical lymph tumor tumour examination immunohistochemical".split()
)
# An end mark with closing quotes and brackets; then white space, or a capital where the space is
# missing ("are free.The tumor"), or a line break with no end mark at all.
_CANDIDATE = re.compile(
    r"[.!?…]+[\"'”’)\]]*(?=\s)"  # the usual end
    r"|(?<=[a-z)\]][a-z)\]])\.(?=[A-Z][a-z])"  # missing space after the period
    r"|(?=\n)"
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘/]*$")
_LIST_NUMBER = re.compile(r"(?:^|[:;])\s*[(\[]?(?:\d{1,2}|[A-Za-z]|[ivxIVX]{1,4})$")
_LIST_ITEM = re.compile(r"\s*(?:[-*•‣▪–—]|[(\[]?(?:\d{1,2}|[A-Za-z])[.)\]])\s")
_MIXED_CASE = re.compile(r"[a-z]{1,3}[A-Z0-9]")  # pT2, ypN0, p53 begin sentences although in lower case
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]$")  # N.S.A.B.P


def plain(text: str) -> str:
    """Text normalised for comparison: case, Unicode form and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_sentences(text: str) -> list[str]:
    """Sentences of a caption, in order, with white space collapsed.

    Only white space is lost: joined, the sentences contain every other character of the text. A paragraph, a list item
    and a line that begins with a capital start a sentence too; a heading ("Diagnosis:") stays with the following
    text. An empty text has no sentences.
    """
    uncased = text == text.lower()
    pieces, start = [], 0
    for match in _CANDIDATE.finditer(text):
        if match.end() > start and _ends_sentence(text, start, match, uncased):
            pieces.append(" ".join(text[start : match.end()].split()))
            start = match.end()
    pieces.append(" ".join(text[start:].split()))
    return _join_fragments([piece for piece in pieces if piece])


def _ends_sentence(text: str, start: int, match: re.Match, uncased: bool) -> bool:
    before, mark, after = text[start : match.start()], match.group(), text[match.end() :]
    rest = after.lstrip()
    if not rest or not before.strip():
        return False
    gap = after[: len(after) - len(rest)]
    if not mark:  # a line break; wrapped text continues with a lower-case letter or a number
        if gap.count("\n") > 1 or _LIST_ITEM.match(rest):
            return True
        return rest[0].isupper() and before.rstrip()[-1] not in ",-–(/" and not _is_abbreviation(before, rest)
    if "\n" in gap and (gap.count("\n") > 1 or _LIST_ITEM.match(rest)):
        return True
    if _LIST_NUMBER.search(before) and mark.startswith("."):
        return False
    first = rest.lstrip("\"'“‘([")[:1]
    if first.islower() and not uncased and not _MIXED_CASE.match(rest):
        return False
    return not (mark == "." and _is_abbreviation(before + mark, rest))


def _is_abbreviation(before: str, rest: str) -> bool:
    """Whether `before` ends with a period that belongs to its last word, given the text after it."""
    if not before.rstrip().endswith("."):
        return False
    before = before.rstrip()[:-1]
    word = _LAST_WORD.search(before).group()
    plain, following = word.lower(), re.match(r"\w*", rest).group().lower()
    if plain in _ABBREVIATIONS:
        return True
    if plain in _BEFORE_NUMBERS:
        return rest[:1].isdigit() or rest[:1] == "#"
    if _DOTTED.match(word):
        return following not in _STARTERS
    if len(word) == 1 and word.isupper() and word not in "IVX":
        previous = before[: -len(word)].split()
        named = not previous or previous[-1][:1].isupper() or previous[-1] in ("by", "and", "&")
        return named and rest[:1].isupper() and following not in _STARTERS
    return False


def _join_fragments(pieces: list[str]) -> list[str]:
    """Merge pieces without words, and headings, into the sentence that they belong to."""
    sentences: list[str] = []
    carried = ""
    for piece in pieces:
        piece = f"{carried} {piece}" if carried else piece
        carried = ""
        if piece.endswith(":"):
            carried = piece
        elif not any(letter.isalnum() for letter in piece):
            if sentences:
                sentences[-1] += f" {piece}"
            else:
                carried = piece
        else:
            sentences.append(piece)
    if carried:
        sentences.append(carried)
    return sentences


def sample_subcaptions(sentences: Sequence[str], k: int, rng: np.random.Generator) -> list[str]:
    """K subcaptions of a caption with these sentences, sampled by `draw_merges`."""
    return [" ".join(sentences[i] for i in merge) for merge in draw_merges(len(sentences), k, rng)]


def draw_merges(n: int, k: int, rng: np.random.Generator, most: int = 3) -> list[tuple[int, ...]]:
    """Indices of the sentences, out of n, that each of K subcaptions merges, in reading order.

    Each draw merges 1 to `most` sentences; every second draw takes adjacent ones, the others random ones (the scheme of
    the paper's released code, which merges up to 3). Most captions have fewer sentences than K, so draws cycle without
    repetition: each sentence leads one draw before any leads a second, and no merge repeats before all have occurred.
    Raises ValueError when there are no sentences.
    """
    if n < 1:
        raise ValueError("no sentences to draw subcaptions from: the caption is empty; leave the slide out")
    possible = sum(math.comb(n, m) for m in range(1, most + 1))
    leaders: list[int] = []
    seen: set[tuple[int, ...]] = set()
    merges = []
    for draw in range(k):
        if not leaders:
            leaders = rng.permutation(n).tolist()
        leader = leaders.pop()
        if len(seen) == possible:
            seen.clear()
        for _ in range(8):
            merge = _merge(n, leader, draw % 2 == 0, most, rng.random(1 + max(most, 3)).tolist())
            if merge not in seen:
                break
        else:  # nearly all have occurred: list the remaining ones, those with this leader first
            left = [c for m in range(1, most + 1) for c in itertools.combinations(range(n), m) if c not in seen]
            left = [c for c in left if leader in c] or left
            merge = left[rng.integers(len(left))]
        seen.add(merge)
        merges.append(merge)
    return merges


def _merge(n: int, leader: int, neighbours: bool, most: int, chance: list[float]) -> tuple[int, ...]:
    m = min(1 + int(most * chance[0]), n)
    if m == 1:
        return (leader,)
    if neighbours:
        low, high = max(0, leader - m + 1), min(leader, n - m)
        first = low + int(chance[1] * (high - low + 1))
        return tuple(range(first, first + m))
    others = [i for i in range(n) if i != leader]
    chosen = [leader] + [others.pop(int(chance[i] * len(others))) for i in range(1, m)]
    return tuple(sorted(chosen))


def draw_given(n: int, k: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Indices of K subcaptions out of n given ones, in random order and each used once before any repeats."""
    if n < 1:
        raise ValueError("no subcaptions to draw from; leave out the key `subcaptions` to draw them from the sentences")
    rounds = [rng.permutation(n) for _ in range(-(-k // n))]
    return [(int(i),) for i in np.concatenate(rounds)[:k]]
