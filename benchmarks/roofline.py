"""The floor under every part of a step: operations over the unit's rate, bytes over the bandwidth, the larger counts.

Operations are those of the algorithm that the library runs (absorbed key and value projections, packed texts) on valid
patches and real tokens, two per multiply-add; bytes are what has to move through memory at least, each tensor that is
too large for a cache written once and read once per use. Prints a Markdown table, the source of ROOFLINE.md.

    python benchmarks/roofline.py --device cpu --regions 24 --batch 2
    python benchmarks/roofline.py --device h200 --batch 64 --dtype bfloat16
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from pathflip_jax.model.config import PathFLIPConfig

# Operations per second by dtype, and bytes per second of memory: data sheets; `cpu` is two cores as measured by
# benchmarks/step.py (matrix products) and by a copy of 1 GB.
DEVICES = {
    "cpu": ({"float32": 0.25e12, "bfloat16": 0.25e12}, 20e9),
    "h200": ({"float32": 494e12, "bfloat16": 989e12}, 4.8e12),  # float32 as TF32
    "v5e": ({"float32": 98e12, "bfloat16": 197e12}, 0.82e12),
}
LENGTHS = Path(__file__).parent / "token_lengths.json"


class Part(NamedTuple):
    """One part of a step: operations and bytes, forward and backward together."""

    name: str
    operations: float
    bytes: float

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds that it takes at least."""
        return max(self.operations / rate, self.bytes / bandwidth)


class Shapes(NamedTuple):
    """What a step sees: slides, regions and valid patches of each, and the lengths of all texts of one slide."""

    slides: int
    regions: int
    patches: int
    lengths: tuple[int, ...]


def typical_lengths() -> tuple[int, ...]:
    """The token lengths of a typical slide's caption and subcaptions."""
    return tuple(json.loads(LENGTHS.read_text())["slides"][0])


def parts(config: PathFLIPConfig, shapes: Shapes, width: int, training: bool) -> list[Part]:
    """The parts of a step; `width` is the bytes of an activation. Training takes three times the forward's work."""
    F, D, H, inner = config.feature_dim, config.embed_dim, config.hidden, config.intermediate
    Q, heads, layers, crossing = config.num_queries, config.heads, config.layers, len(config.cross_layers)
    B, R, N = shapes.slides, shapes.regions, shapes.patches
    T, squares = sum(shapes.lengths), sum(n * n for n in shapes.lengths)
    passes = 3 if training else 1
    rows = B * (1 + R) * Q  # query tokens of a batch, slide and regions
    read = 2 * B * N  # every patch is scored and pooled by the slide's queries and by its region's
    found = []

    def part(name: str, multiply_adds: float, moved: float) -> None:
        found.append(Part(name, 2 * passes * multiply_adds, passes * moved))

    part("patch projection", B * N * F * D, B * N * (2 * F + D * width))
    part("queries: projections of cross-attention", crossing * rows * (2 * H * H + 2 * H * D), crossing * 4 * H * H)
    # Scores and their softmax are written and read once each way in float32; patches are read for scores and pooling.
    scores = read * heads * Q
    part("patches: scores and pooling", crossing * 2 * scores * D, crossing * (2 * read * D * width + 4 * scores * 4))
    part("queries: self-attention", layers * rows * (4 * H * H + 2 * Q * H), layers * rows * 8 * H * width)
    part("queries: feed-forward", layers * rows * 2 * H * inner, layers * rows * (2 * H + 2 * inner) * width)
    part("text: projections", layers * B * T * 4 * H * H, layers * B * T * 8 * H * width)
    part("text: attention", layers * B * 2 * squares * H, layers * B * 4 * squares * heads * width)
    part("text: feed-forward", (layers - 1) * B * T * 2 * H * inner, layers * B * T * (2 * H + 2 * inner) * width)
    if training:
        # AdamW reads weight, gradient and two moments and writes three of them, in float32.
        found.append(Part("optimizer", 12 * parameters(config), 28 * parameters(config)))
    return found


def parameters(config: PathFLIPConfig) -> int:
    """The number of parameters."""
    import math

    from pathflip_jax.checkpoint import abstract_params

    return sum(math.prod(x.shape) for x in abstract_params(config).values())


def table(found: list[Part], rate: float, bandwidth: float, slides: int) -> str:
    """The parts as Markdown, largest floor first."""
    total = sum(part.floor(rate, bandwidth) for part in found)
    rows = ["| part | GFLOP a slide | MB a slide | bound by | floor, ms a slide | share |", "|---|---|---|---|---|---|"]
    for part in sorted(found, key=lambda part: -part.floor(rate, bandwidth)):
        floor = part.floor(rate, bandwidth)
        bound = "arithmetic" if part.operations / rate >= part.bytes / bandwidth else "memory"
        rows.append(
            f"| {part.name} | {part.operations / slides / 1e9:.1f} | {part.bytes / slides / 1e6:.0f} | {bound} | "
            f"{1e3 * floor / slides:.2f} | {floor / total:.0%} |"
        )
    operations = sum(part.operations for part in found)
    rows.append(f"| all | {operations / slides / 1e9:.1f} | | | {1e3 * total / slides:.2f} | 100% |")
    return "\n".join(rows)


def main() -> int:
    """Print the table of one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=2, help="slides a step")
    parser.add_argument("--regions", type=int, default=24, help="regions a slide, of 256 patches")
    parser.add_argument("--rate", type=float, help="operations per second, instead of the device's")
    parser.add_argument("--bandwidth", type=float, help="bytes per second, instead of the device's")
    parser.add_argument("--inference", action="store_true", help="the forward pass alone")
    options = parser.parse_args()
    rates, bandwidth = DEVICES[options.device]
    rate = options.rate or rates[options.dtype]
    shapes = Shapes(options.batch, options.regions, 256 * options.regions, typical_lengths())
    width = 2 if options.dtype == "bfloat16" else 4
    found = parts(PathFLIPConfig(), shapes, width, not options.inference)
    print(table(found, rate, options.bandwidth or bandwidth, options.batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
