"""Communication between devices of a compiled program, read from its scheduled HLO, and the share not overlapped.

A collective is a plain instruction, a pair of `-start` and `-done`, or, on TPUs, a chain of fusions that all name its
channel: the first sends, those in between compute while the data are in transit, and the last receives; those in
between may lie in a loop that runs in the meantime. The bytes that each of n participating devices sends are those of
ring algorithms (`Collective.wire_bytes`). A collective overlaps if compute is scheduled between its two ends. The
cycles of that compute, by the compiler's estimate, are read as well; the same compute never hides two collectives.
"""

import math
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
              "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

NO_ESTIMATE = str(2**63 - 1)  # cycles that the TPU compiler writes for an operation without an estimate


class Instruction(NamedTuple):
    """One line of HLO: its name, the text of its type, the operation, and the text after the opening bracket."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depths = accumulate(((x == "(") - (x == ")") for x in self.rest), initial=1)
        end = next((place for place, depth in enumerate(depths) if not depth), len(self.rest))
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    def named(self, attribute: str) -> str | None:
        """Name of the computation in an attribute such as `calls`, None without that attribute."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    @property
    def cycles(self) -> float:
        """The compiler's estimate of its cycles; 0 if there is none or it is `NO_ESTIMATE`."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return float(found[1]) if found and found[1] != NO_ESTIMATE else 0.0


class Collective(NamedTuple):
    """A collective operation: bytes of its operands on each device, participating devices, runs per step.

    It `overlaps` if compute lies between its start and its end; `hidden_cycles` is that compute over all runs, without
    compute that already hides another collective.
    """

    kind: str
    bytes: int
    devices: int
    runs: int
    overlaps: bool
    hidden_cycles: float
    dtypes: tuple[str, ...]
    source: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends per step.

        In a ring of n: an all-gather passes on n-1 shares, a reduce-scatter and an all-to-all n-1 of the n parts of
        the operand, an all-reduce is a reduce-scatter and an all-gather; a permutation sends the operand.
        """
        n = self.devices
        factors = {
            "all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "reduce-scatter": (n - 1) / n,
            "all-to-all": (n - 1) / n, "ragged-all-to-all": (n - 1) / n, "collective-permute": 1,
        }  # fmt: skip
        return self.runs * self.bytes * factors[self.kind]


class Traffic(NamedTuple):
    """The collectives of a program, and the compiler's estimate of the cycles of all its compute."""

    collectives: list[Collective]
    cycles: float

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in a step."""
        return sum(x.wire_bytes for x in self.collectives)

    @property
    def synchronous_bytes(self) -> float:
        """Bytes sent by collectives that no compute overlaps."""
        return sum(x.wire_bytes for x in self.collectives if not x.overlaps)

    def waited_bytes(self, compute_seconds: float, rate: float) -> float:
        """Bytes that compute does not hide, if all compute takes `compute_seconds` and links carry `rate` bytes/s."""
        per_cycle = compute_seconds / self.cycles * rate if self.cycles else 0.0
        return sum(max(x.wire_bytes - x.hidden_cycles * per_cycle, 0.0) for x in self.collectives)


def read_traffic(program: str, devices: int) -> Traffic:
    """Traffic of a program's scheduled HLO text, compiled for that many devices.

    Loops count as often as they run. Raises ValueError for a loop with collectives whose number of runs is unknown.
    """
    computations, entry = read_computations(program)
    return _traffic(computations, entry, devices, 1, frozenset())


def read_computations(program: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation of a program's scheduled HLO text, and the name of its entry."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            current = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(Instruction(*instruction.groups()))
    if not entry:
        raise ValueError(
            "the program's text has no ENTRY computation: expected scheduled HLO, the as_text() of a compiled program"
        )
    return found, entry


def _traffic(
    computations: dict[str, list[Instruction]], name: str, devices: int, runs: int, begun: frozenset[str]
) -> Traffic:
    """Traffic of a computation that runs `runs` times, without collectives that have `begun` before it."""
    schedule = computations[name]
    types = {x.name: x.type for x in schedule}
    sites: dict[str, list[int]] = {}  # start, continuation and end of each collective
    first: dict[str, tuple[str, Instruction, dict[str, str]]] = {}
    key_of: dict[str, str] = {}
    inner: list[Traffic] = []
    cycles = [0.0] * len(schedule)
    for place, instruction in enumerate(schedule):
        if instruction.operation == "while":
            inner.append(_loop(computations, instruction, devices, runs, begun | sites.keys()))
            cycles[place] = inner[-1].cycles / runs
            continue
        cycles[place] = instruction.cycles
        for key, kind, collective, its_types in _inside(computations, instruction, types):
            if key in begun:
                continue
            first.setdefault(key, (kind, collective, its_types))
            sites.setdefault(key, []).append(place)
            key_of[instruction.name] = key
        if instruction.operation.endswith(("-done", "-update")):
            for operand in instruction.operands:
                if operand in key_of:
                    key_of[instruction.name] = key_of[operand]
                    sites[key_of[operand]].append(place)
    left, found = list(cycles), []
    for key, places in sites.items():
        kind, instruction, its_types = first[key]
        between = range(places[0] + 1, places[-1])
        hidden, overlaps = sum(left[place] for place in between), any(cycles[place] for place in between)
        for place in between:
            left[place] = 0.0
        operands = [its_types.get(operand, "") for operand in instruction.operands] or [instruction.type]
        dtypes = tuple(sorted({dtype for text in operands for dtype, _ in array_shapes(text)}))
        size = sum(array_bytes(text) for text in operands)
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        taking = _group_size(instruction.rest, devices)
        found.append(Collective(kind, size, taking, runs, overlaps, runs * hidden, dtypes, source[1] if source else ""))
    return Traffic(found + [x for part in inner for x in part.collectives], runs * sum(cycles))


def _loop(
    computations: dict[str, list[Instruction]], loop: Instruction, devices: int, runs: int, begun: frozenset[str]
) -> Traffic:
    trips = loop_runs(computations, loop)
    body = _traffic(computations, loop.named("body"), devices, runs * (trips or 1), begun)
    if trips is None and body.collectives:
        raise ValueError(f"{loop.name}: a loop with collectives, but the HLO does not state how often it runs")
    return body


def loop_runs(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """Trip count of a loop, if the HLO states it or compares a counter (which JAX starts at 0) with a constant."""
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(told[1])
    condition = computations.get(loop.named("condition"), [])
    compared = [x for x in condition if x.operation == "compare" and "direction=LT" in x.rest]
    bounds = {x.name: int(n[1]) for x in condition if x.operation == "constant" and (n := re.match(r"(\d+)\)", x.rest))}
    found = [bounds[name] for x in compared for name in x.operands[1:] if name in bounds]
    return found[0] if len(compared) == len(found) == 1 else None


def _inside(
    computations: dict[str, list[Instruction]], instruction: Instruction, types: dict[str, str]
) -> Iterator[tuple[str, str, Instruction, dict[str, str]]]:
    """(key, kind, instruction, types) of each collective that an instruction is or calls."""
    kind = instruction.operation.removesuffix("-start")
    if kind in KINDS:
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        yield f"{kind} {channel[1] if channel else instruction.name}", kind, instruction, types
    called = instruction.named("calls")
    if called in computations:
        body = computations[called]
        for part in body:
            for key, kind, collective, its_types in _inside(computations, part, {x.name: x.type for x in body}):
                # On TPUs, the name of an all-reduce of which every device keeps only a part.
                kept = kind == "all-reduce" and called.startswith("all-reduce-scatter")
                yield key, "reduce-scatter" if kept else kind, collective, its_types


def array_shapes(text: str) -> list[tuple[str, str]]:
    """(dtype, sizes) of each array that the text of a type names."""
    return [pair for pair in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text) if pair[0] in ITEM_BYTES]


def array_bytes(text: str) -> int:
    """The bytes of an array, or of all arrays of a tuple."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in array_shapes(text)
    )


def _group_size(attributes: str, devices: int) -> int:
    """Number of devices in a collective, for each of HLO's notations of groups."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    return devices
