"""Broken and hostile mutations of valid files, drawn from a random state, for `fuzz.py` and its tests.

Blind mutations flip, cut, repeat and splice bytes; the others know the format, so that their results pass checksums and
parsers and reach the code behind them.
"""

import csv
import io
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

INTEGERS = (0, 1, -1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
NUMBERS = (*INTEGERS, 2**63, 2**64, 10**12, 10**400, *FLOATS)
PATHS = ("../../x", "/etc/passwd", "..", ".", "a/b", "..\\..\\x", "C:\\x", "x\x00y", "~/x", "%2e%2e%2fx", "x" * 300)
TEXTS = ("", " ", "\ufeff", "\u202e", "é" * 90, "A" * 5000, "\ud800", "<script>", "{{7*7}}", "!!python/object:os")
OTHERS = (None, True, False, [], {}, [[]], {"": None}, ["A"], {"from": "gpt"})
VALUES: tuple[Any, ...] = (*NUMBERS, *PATHS, *TEXTS, *OTHERS)
TOKENS = (
    b"\x00", b"\xff" * 8, b"\n", b"\r", b'"', b",", b";", b"\t", b"{", b"[", b"}", b"]", b"\\ud800", b"\xef\xbb\xbf",
    b"../../x", b"1e999", b"NaN", b"\x80\x02", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"[" * 3000,
)  # fmt: skip

Mutation = Callable[[random.Random, list[bytes]], bytes]


def blind(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of the valid files `seeds`, changed by one to three mutations that ignore its format."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_BLIND)(rng, data, seeds)
    return bytes(data)


def _flip(rng, data, seeds):
    for _ in range(rng.choice((1, 1, 2, 8, 32)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _overwrite(rng, data, seeds):
    start, size = _block(rng, data)
    data[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data


def _truncate(rng, data, seeds):
    return data[: rng.randrange(len(data) + 1)]


def _repeat(rng, data, seeds):
    start, size = _block(rng, data)
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[start : start + size] * rng.choice((1, 1, 2, 50))
    return data


def _delete(rng, data, seeds):
    start, size = _block(rng, data)
    del data[start : start + size]
    return data


def _integer(rng, data, seeds):
    """Replace an integer of any width at a plausible position."""
    code = rng.choice("BHIQ")
    size = struct.calcsize(code)
    if len(data) > size:
        at = rng.randrange(len(data) - size)
        at -= at % rng.choice((1, size))
        value = rng.choice(INTEGERS) % 2 ** (8 * size)
        data[at : at + size] = struct.pack(rng.choice("<>") + code, value)
    return data


def _length(rng, data, seeds):
    """Change a number that may be a length or an offset, slightly or grossly."""
    code = rng.choice(("<I", "<Q", ">I", "<H"))
    size, tries = struct.calcsize(code), 20
    for _ in range(tries if len(data) > size else 0):
        at = rng.randrange(len(data) - size)
        value = struct.unpack_from(code, data, at)[0]
        if 0 < value <= len(data):
            value = rng.choice((value + 1, value - 1, value * 2, value + len(data), value << 8, 0, *INTEGERS))
            struct.pack_into(code, data, at, value % 2 ** (8 * size))
            break
    return data


def _splice(rng, data, seeds):
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _token(rng, data, seeds):
    at, token = rng.randrange(len(data) + 1), rng.choice(TOKENS)
    data[at : at + rng.choice((0, len(token)))] = token
    return data


def _block(rng, data) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, rng.randrange(min(rng.choice((4, 16, 64, 1024)), len(data) - start) + 1)


_BLIND = (_flip, _flip, _overwrite, _truncate, _repeat, _delete, _integer, _integer, _length, _length, _splice, _token)


def mix_with_blind(share: float, format_aware: Mutation) -> Mutation:
    """The mutation `format_aware`, replaced by a blind one for a share of the inputs."""

    def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
        return blind(rng, seeds) if rng.random() < share else format_aware(rng, seeds)

    return mutate


def change(rng: random.Random, value: Any) -> Any:
    """A JSON value with one node changed: another value or type, deleted, repeated, renamed, or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        draw = rng.random()
        if draw < 0.1:
            del changed[key]
        elif draw < 0.15:
            changed[rng.choice((*PATHS, *TEXTS))] = changed.pop(key)
        else:
            changed[key] = change(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, draw = rng.randrange(len(value)), rng.random()
        if draw < 0.1:
            return value[:at] + value[at + 1 :]
        if draw < 0.2:
            return value[:at] + [value[at]] * rng.choice((2, 30)) + value[at:]
        return [*value[:at], change(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice((value[: len(value) // 2], value * 40, value + rng.choice(TEXTS), value.upper()))
    if rng.random() < 0.1:
        return rng.choice(([value], {"x": value}, str(value)))
    return rng.choice(VALUES)


def json_text(rng: random.Random, seeds: list[bytes]) -> bytes:
    """JSON or JSON Lines that can be parsed, except for a few that nest too deeply or repeat a key."""
    seed = rng.choice(seeds).decode()
    if rng.random() < 0.02:
        depth = rng.choice((500, 5_000, 100_000))
        return rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)).encode()
    try:
        lines, separator = [json.loads(seed)], ""
    except ValueError:
        lines, separator = [json.loads(line) for line in seed.splitlines()], "\n"
    at = rng.randrange(len(lines))
    lines[at] = change(rng, lines[at])
    text = separator.join(_dump(line) for line in lines)
    if rng.random() < 0.05 and '"' in text:
        name = text.split('"')[1]
        text = text.replace("{", f'{{"{name}": 1, ', 1)
    return text.encode("utf-8", "surrogatepass" if rng.random() < 0.2 else "backslashreplace")


def _dump(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # Python writes an integer of 400 digits, but not one of 5,000
        return repr(value)


def table(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A CSV file with cells, rows, quotes or separators changed."""
    rows = list(csv.reader(io.StringIO(rng.choice(seeds).decode("utf-8-sig"))))
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rng.choice(rows)
        draw, at = rng.random(), rng.randrange(len(row) + 1)
        if draw < 0.6 and row:
            row[at % len(row)] = str(rng.choice(VALUES))
        elif draw < 0.75:
            row.insert(at, str(rng.choice(VALUES)))
        elif draw < 0.85 and row:
            del row[at % len(row)]
        elif draw < 0.9:
            rows.append(list(row))
        elif len(rows) > 1:
            rows.remove(row)
    out = io.StringIO()
    csv.writer(out, delimiter=rng.choice(",,,;\t"), lineterminator=rng.choice(("\n", "\n", "\r\n", "\r"))).writerows(
        rows
    )
    data = bytearray(out.getvalue().encode("utf-8", "replace"))
    return bytes(_token(rng, data, seeds) if rng.random() < 0.2 else data)


def zip_entries(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A zip archive as PyTorch saves it, with one entry changed, left out, renamed or inflated, and valid checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(rng.choice(seeds))) as archive, zipfile.ZipFile(out, "w") as changed:
        names = archive.namelist()
        chosen, draw = rng.choice(names), rng.random()
        for name in names:
            data, method = archive.read(name), zipfile.ZIP_STORED
            if name == chosen and draw < 0.05:
                continue
            if name == chosen and draw < 0.1:
                name = rng.choice(PATHS[:5])
            elif name == chosen and draw < 0.15:
                data, method = bytes(rng.choice((10**5, 10**7))), zipfile.ZIP_DEFLATED
            elif name == chosen:
                data = blind(rng, [data or b"\x00"])
            changed.writestr(name, data, method)
    return out.getvalue()


def hostile_pickles(touched: str) -> list[bytes]:
    """Pickles that would create the file `touched` if they were executed, bare and in PyTorch's container."""

    class Call:
        def __init__(self, function: Any, *arguments: Any) -> None:
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    payloads = [
        Call(os.system, f"touch {touched}"),
        Call(open, touched, "w"),
        Call(eval, f"open({touched!r}, 'w')"),
        Call(pathlib.Path.touch, pathlib.Path(touched)),
        {"features": Call(exec, f"open({touched!r}, 'w')")},
    ]
    found = [pickle.dumps(payload, protocol) for payload in payloads for protocol in (0, 2, 4)]
    for data in list(found):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/version", "3\n")
            archive.writestr("x/byteorder", "little")
        found.append(out.getvalue())
    return found
