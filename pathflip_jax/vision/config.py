"""Shape of a published vision transformer, and its transform of pixels."""

import math
from dataclasses import dataclass
from typing import Literal

FeedForward = Literal["gelu", "quick_gelu", "swiglu"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Vision transformer with the options in which published patch encoders differ.

    `patch` and `image` are pixels on a side, `hidden` the width inside the feed-forward network. `grid` is the side of
    the position table in the file, 0 for one that fits the image; `prefix_positions` is the number of its rows before
    those of the patches: for the class token, and for registers where they have positions. `resize` is the way in which
    the original resamples a table of another size (`positions.fitted`). `pooling` and `head` make the feature vector
    of the tokens; `head_width` is its length where there is a head or a pooler.
    """

    width: int
    depth: int
    heads: int
    patch: int
    hidden: int
    image: int = 224
    feed_forward: FeedForward = "gelu"
    layer_scale: bool = True
    registers: int = 0
    grid: int = 0
    prefix_positions: int = 1
    resize: Literal["antialias", "bicubic", "offset"] = "antialias"
    rope: bool = False
    pre_norm: bool = False
    eps: float = 1e-6
    pooling: Literal["class", "class_and_mean", "attention"] = "class"
    pooler_bias: bool = True
    head: Literal["none", "linear", "mlp"] = "none"
    head_width: int = 0
    unit_length: bool = False

    @property
    def side(self) -> int:
        """Patches on a side of the image."""
        return self.image // self.patch

    @property
    def table_side(self) -> int:
        """Side of the position table in the file."""
        return self.grid or self.side

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: the class token and registers."""
        return 1 + self.registers

    @property
    def features(self) -> int:
        """Length of the feature vector."""
        if self.head_width:
            return self.head_width
        return self.width * (2 if self.pooling == "class_and_mean" else 1)

    def operations(self) -> int:
        """Floating point operations of a patch in matrix products and attention, two for a multiply-add."""
        tokens = self.prefix + self.side**2
        feed_forward = self.hidden * (3 if self.feed_forward == "swiglu" else 2)
        layer = self.width * (4 * self.width + feed_forward) + 2 * tokens * self.width
        embedding = self.side**2 * self.patch**2 * 3 * self.width
        return 2 * (self.depth * tokens * layer + embedding)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Transform of pixels before a network: resized to `resize` pixels, cropped at the centre to `crop`, normalised.

    `kind` is the filter of the resampling; `mean` and `std` are of red, green and blue on a scale of 0 to 1.
    """

    resize: int
    crop: int
    kind: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def margin(self) -> int:
        """Pixels cropped at the left and at the top, rounded as torchvision does."""
        return round((self.resize - self.crop) / 2)


def swiglu_hidden(width: int) -> int:
    """Hidden width of a SwiGLU in DINOv2: two thirds of 4 times the width, up to a multiple of 8."""
    return 8 * math.ceil(int(8 * width / 3) / 8)
