"""Cost of a compiled TPU program by part of the model, read from its scheduled HLO.

An operation is an instruction of the schedule. A fusion is classified by its content: one that contains a matrix
product counts as work of the matrix unit, whatever else it contains. Cycles are the compiler's estimate. Bytes are
those of all operands and results, once unpadded and once in tiles, where rows are padded to 128 lanes and columns to 8
sublanes or more. FLOPs are those of products alone, computed from their shapes. Loops count as often as they run, or
once if the number of runs is unknown.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from traffic import ITEM_BYTES, KINDS, Instruction, array_bytes, array_shapes, loop_runs, read_computations

PARTS = (
    "patch_projection", "query_self_attention", "cross_attention", "query_feed_forward", "patch_decoder",
    "region_layers", "text_embedding", "text_attention", "text_feed_forward", "slide_loss", "region_loss", "optimizer",
    "decoder_attention", "decoder_feed_forward", "logits",
)  # fmt: skip
OTHER = "other"
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
# Kind of an operation outside the matrix unit: the first of these found in it or in its fusion.
FORMS = (
    ("gather, scatter", {"gather", "scatter", "dynamic-slice", "dynamic-update-slice"}),
    ("sort", {"sort", "topk"}),
    ("transpose, copy", {"transpose", "copy", "reverse"}),
    ("pad, concatenate", {"pad", "concatenate", "slice"}),
    ("sum, maximum", {"reduce", "reduce-window"}),
)
MATRIX, TRAFFIC, ELEMENTWISE = "product", "collective", "elementwise"
_LAID_OUT = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?[^}]*\})?")


class Operation(NamedTuple):
    """Instruction of the schedule: kind of work, part of the model, and its cost over all of its runs."""

    name: str
    kind: str
    part: str
    backward: bool
    source: str
    type: str
    cycles: float
    bytes: float
    laid_out: float
    flops: float


def read_operations(program: str) -> list[Operation]:
    """Operations of a program's scheduled HLO text that take time."""
    computations, entry = read_computations(program)
    return list(_operations(computations, entry, 1))


def _operations(computations: dict[str, list[Instruction]], name: str, runs: int) -> Iterator[Operation]:
    types = {x.name: x.type for x in computations[name]}
    for instruction in computations[name]:
        operation = instruction.operation
        if operation in FREE or operation.endswith(("-start", "-done", "-update")):
            continue  # asynchronous operations: their time is included in the cycles of the others
        if operation == "while":
            yield from _operations(
                computations, instruction.named("body"), runs * (loop_runs(computations, instruction) or 1)
            )
            continue
        if operation in ("call", "conditional"):
            for attribute in ("to_apply", "true_computation", "false_computation"):
                if instruction.named(attribute) in computations:
                    yield from _operations(computations, instruction.named(attribute), runs)
            continue
        held = list(_held(computations, instruction, types))
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        source = source[1] if source else ""
        texts = [instruction.type, *(types.get(operand, "") for operand in instruction.operands)]
        yield Operation(
            instruction.name,
            _kind({x.operation.removesuffix("-start") for x, _ in held}),
            part_of(source),
            "transpose(" in source,
            source,
            re.sub(r"\{[^}]*\}", "", instruction.type),
            runs * instruction.cycles,
            runs * sum(map(array_bytes, texts)),
            runs * sum(map(laid_out_bytes, texts)),
            runs * sum(product_flops(x, inner) for x, inner in held),
        )


def _held(
    computations: dict[str, list[Instruction]], instruction: Instruction, types: dict[str, str]
) -> Iterator[tuple[Instruction, dict[str, str]]]:
    """Instruction and those that it fuses, each with the types in its computation."""
    yield instruction, types
    body = computations.get(instruction.named("calls"), [])
    inner = {x.name: x.type for x in body}
    for part in body:
        yield from _held(computations, part, inner)


def _kind(operations: set[str]) -> str:
    if operations & {"convolution", "dot"}:
        return MATRIX
    if operations & set(KINDS):
        return TRAFFIC
    return next((form for form, members in FORMS if operations & members), ELEMENTWISE)


def part_of(source: str) -> str:
    """Part of the model that an operation belongs to: the innermost matching scope in its name."""
    found = [word for word in re.findall(r"\w+", source) if word in PARTS]
    return found[-1] if found else OTHER


def laid_out_bytes(text: str) -> int:
    """Bytes of the arrays of a type, padded to whole tiles."""
    total = 0
    for dtype, sizes, order, tile in _LAID_OUT.findall(text):
        if dtype not in ITEM_BYTES:
            continue
        shape = [int(n) for n in sizes.split(",") if n]
        minor_first = [shape[int(axis)] for axis in order.split(",") if axis] or shape[::-1]
        tiles = [int(n) for n in tile.split(",") if n][::-1]
        minor_first += [1] * (len(tiles) - len(minor_first))
        filled = [-(-n // t) * t for n, t in zip(minor_first, tiles, strict=False)] + minor_first[len(tiles) :]
        total += ITEM_BYTES[dtype] * math.prod(filled)
    return total


def product_flops(instruction: Instruction, types: dict[str, str]) -> float:
    """FLOPs of a product, twice its multiplications, from its shapes; 0 for anything else."""
    if instruction.operation not in ("dot", "convolution"):
        return 0.0
    left, right = (_shape(types.get(name, "")) for name in instruction.operands[:2])
    output = _shape(instruction.type)
    if instruction.operation == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2.0 * math.prod(output) * math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
    of_left, of_right, of_output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    count = output[of_output.index("b")] * output[of_output.index("f")] * right[of_right.index("i")]
    for axis in sorted(set(of_output) - {"b", "f"}):
        window = _window(instruction.rest, int(axis))
        sizes = (left[of_left.index(axis)], right[of_right.index(axis)], output[of_output.index(axis)])
        count *= _meetings(*sizes, **window)
    return 2.0 * count / (int(groups[1]) if groups else 1)


def _shape(text: str) -> list[int]:
    found = array_shapes(text)
    return [int(n) for n in found[0][1].split(",") if n] if found else []


def _window(rest: str, axis: int) -> dict[str, int]:
    """Window of a convolution's axis: its stride, the padding before it and the dilations of both operands."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(item.split("=") for item in window[1].split()) if window else {}

    def at(name: str, default: str) -> str:
        return given[name].split("x")[axis] if name in given else default

    return {
        "stride": int(at("stride", "1")),
        "before": int(at("pad", "0_0").split("_")[0]),
        "left_dilation": int(at("lhs_dilate", "1")),
        "right_dilation": int(at("rhs_dilate", "1")),
    }


def _meetings(
    left: int, right: int, output: int, stride: int, before: int, left_dilation: int, right_dilation: int
) -> int:
    """Number of pairs of window and input entries along an axis of a convolution, without padding and dilation."""
    place = np.arange(output)[:, None] * stride + np.arange(right) * right_dilation - before
    return int(((place >= 0) & (place <= (left - 1) * left_dilation) & (place % left_dilation == 0)).sum())


def by_part(operations: list[Operation]) -> dict[str, dict[str, Any]]:
    """Totals of each part of the model, the costliest first: cycles, cycles by kind of work, bytes, FLOPs."""
    found: dict[str, dict[str, Any]] = {}
    for part in {x.part for x in operations}:
        own = [x for x in operations if x.part == part]
        kinds: dict[str, float] = defaultdict(float)
        for x in own:
            kinds[x.kind] += x.cycles
        sums = {name: sum(getattr(x, name) for x in own) for name in ("cycles", "bytes", "laid_out", "flops")}
        found[part] = sums | {
            "backward_cycles": sum(x.cycles for x in own if x.backward),
            "cycles_by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["cycles"]))


def off_matrix(operations: list[Operation], most: int = 12) -> list[dict[str, Any]]:
    """Costliest work outside the matrix unit: similar operations of a part are summed, the longest first."""
    groups: dict[tuple, list[Operation]] = defaultdict(list)
    for x in operations:
        if x.kind not in (MATRIX, TRAFFIC):
            groups[x.part, x.backward, x.kind, x.source.rpartition("/")[2], x.type].append(x)
    rows = [
        {
            "part": part, "backward": backward, "kind": kind, "operation": name, "type": type_[:120],
            "count": len(own), "cycles": sum(x.cycles for x in own), "bytes": sum(x.bytes for x in own),
            "filling": sum(x.laid_out for x in own) / max(sum(x.bytes for x in own), 1) - 1,
        }
        for (part, backward, kind, name, type_), own in groups.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["cycles"])[:most]
