"""Side of the benchmark of slides to features, run once in a process of its own: `extract.py` starts it.

`ours` is the command `pathflip prepare` itself. `plain` is a torch loop over timm as extraction tools write it: slide
by slide, a DataLoader with worker processes that read tiles by OpenSlide and transform them with Pillow, autocast.
`tuned` is the best torch that a good engineer would write in a day: one loader over all slides, uint8 pixels, pinned
and transferred without waiting, resized and normalised on the device, full batches across slides, `torch.compile`,
channels last, bfloat16 weights. All sides read the same patches with the same weights; `seconds` are those from the
start of the first batch to the features of the last.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openslide
from PIL import Image

from pathflip_jax.vision.recipes import RECIPES, Recipe

SIDES = ("ours", "plain", "tuned")
IN_FLIGHT = 3  # batches that the tuned side has started before it fetches the features of the first


class Tiled(NamedTuple):
    """Slide file and the patches to read: x, y [N, 2] at level 0, level, edge in pixels there and after resampling."""

    path: Path
    coords: np.ndarray
    level: int
    edge: int
    size: int


class Setup(NamedTuple):
    """Input of a side."""

    recipe: Recipe
    weights: Path
    slides: list[Tiled]
    device: str
    half: bool
    workers: int
    batch: int


class Run(NamedTuple):
    """Result of a side: seconds and patches, features [N, F] by slide, and further figures."""

    seconds: float
    patches: int
    features: dict[str, np.ndarray]
    more: dict[str, Any] = {}


def read_tiles(folder: Path, tiles: Path) -> list[Tiled]:
    """Slides of a folder with the patches in the file `tiles`."""
    with np.load(tiles) as found:
        places = {name: (found[name], *map(int, found[f"{name}/place"])) for name in found.files if "/" not in name}
    return [Tiled(folder / name, *place) for name, place in sorted(places.items())]


def read_tile(image: openslide.OpenSlide, slide: Tiled, x: int, y: int) -> Image.Image:
    """Patch read by one `read_region`, white outside the slide, resampled where the level has another resolution."""
    patch = image.read_region((x, y), slide.level, (slide.edge, slide.edge))
    beyond = slide.edge * image.level_downsamples[slide.level]
    if x + beyond > image.dimensions[0] or y + beyond > image.dimensions[1]:
        patch = Image.alpha_composite(Image.new("RGBA", patch.size, "white"), patch)
    patch = patch.convert("RGB")
    return patch if slide.edge == slide.size else patch.resize((slide.size,) * 2, Image.Resampling.BILINEAR)


def reduced(recipe: Recipe, layers: int | None) -> Recipe:
    """The registered recipe, in this process changed to that many layers, to check that everything works."""
    if layers:
        object.__setattr__(recipe, "network", replace(recipe.network, depth=layers))
    return recipe


# Ours.


def ours(setup: Setup, slides: Path, out: Path) -> Run:
    """The product's own command; its report has the time, without compilation and start."""
    from pathflip_jax import cli
    from pathflip_jax.data.records.records import Records

    recipe = setup.recipe
    command = ["prepare", str(slides), "--encoder", recipe.name, "--weights", str(setup.weights), "--out", str(out)]
    command += ["--patch-size", str(recipe.patch_size), "--mpp", str(recipe.mpp), "--workers", str(setup.workers)]
    command += ["--batch-size", str(setup.batch), "--json"] + ["--half"] * setup.half
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main(command)
    if code:
        raise RuntimeError(f"pathflip {' '.join(command)} ended with {code}: {printed.getvalue()}")
    device = json.loads(printed.getvalue().splitlines()[-1])["device"]
    records, features = Records(out), {}
    for slide in setup.slides:
        found = records.read(records.position(slide.path.stem))
        rows = {tuple(place): row for place, row in zip(found.coords.tolist(), found.features, strict=True)}
        features[slide.path.stem] = np.stack([rows[tuple(place)] for place in slide.coords.tolist()])
    more = {name: value for name, value in device.items() if name not in ("seconds", "patches")}
    return Run(device["seconds"], device["patches"], features, more)


# PyTorch.


@functools.cache
def import_timm():
    """timm, which imports torchvision; the index's build of that beside a CPU build of torch misses two operators."""
    import torch

    if torch.__version__.endswith("+cpu") and not importlib.metadata.version("torchvision").endswith("+cpu"):
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    import timm

    return timm


def make_model(recipe: Recipe):
    """timm's class with the arguments of the model cards."""
    timm, network = import_timm(), recipe.network
    import torch

    more: dict[str, Any] = {"init_values": 1e-5} if network.layer_scale else {}
    if network.feed_forward == "swiglu":
        more |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    if network.registers:
        more |= {"reg_tokens": network.registers, "no_embed_class": not network.prefix_positions}
    gated = 2 if network.feed_forward == "swiglu" else 1
    return timm.models.vision_transformer.VisionTransformer(
        img_size=network.image, patch_size=network.patch, embed_dim=network.width, depth=network.depth,
        num_heads=network.heads, mlp_ratio=gated * network.hidden / network.width, num_classes=0,
        dynamic_img_size=True, **more,
    )  # fmt: skip


def write_weights(recipe: Recipe, folder: Path) -> None:
    """Write random weights under the published names: none is zero, and features differ from patch to patch."""
    model = make_model(recipe)
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            spread = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 and "embed" not in name else 0.2
            parameter.normal_(float(is_scale), spread)
    folder.mkdir(parents=True, exist_ok=True)
    name = recipe.files[0]
    if name.endswith(".safetensors"):
        save_file(model.state_dict(), folder / name)
    else:
        torch.save(model.state_dict(), folder / name)


def load_model(setup: Setup):
    """timm's class with the weights, on the device."""
    import torch
    from safetensors.torch import load_file

    model, path = make_model(setup.recipe), setup.weights / setup.recipe.files[0]
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)
    model.load_state_dict(state)
    return model.to(setup.device).eval()


def pillow_transform(recipe: Recipe) -> Callable:
    """torchvision's transform of a Pillow image, as the model cards write it."""
    import_timm()
    from torchvision import transforms

    wanted = recipe.transform
    kind = transforms.InterpolationMode(wanted.kind)
    steps = [transforms.Resize(wanted.resize, interpolation=kind), transforms.CenterCrop(wanted.crop)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(wanted.mean, wanted.std)])


class Patches:
    """Dataset of the patches of slides, each read by OpenSlide and transformed; a worker keeps its slides open."""

    def __init__(self, slides: list[Tiled], transform: Callable) -> None:
        self.slides, self.transform = slides, transform
        self.rows = [(i, x, y) for i, slide in enumerate(slides) for x, y in slide.coords.tolist()]
        self.opened: dict[int, openslide.OpenSlide] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int):
        number, x, y = self.rows[row]
        slide = self.slides[number]
        if number not in self.opened:
            self.opened[number] = openslide.OpenSlide(slide.path)
        return self.transform(read_tile(self.opened[number], slide, x, y))


def plain_encoder(setup: Setup) -> Callable:
    """Call of the model in eager mode: float32, or autocast to float16 on a GPU and bfloat16 on a CPU."""
    import torch

    model, kind = load_model(setup), torch.float16 if setup.device == "cuda" else torch.bfloat16

    @torch.inference_mode()
    def encode(images):
        with torch.autocast(setup.device, kind, enabled=setup.half):
            return model(images)

    return encode


def plain(setup: Setup, slides: Path, out: Path) -> Run:
    """Slide by slide, as extraction tools do it."""
    import torch
    from torch.utils.data import DataLoader

    encode, transform = plain_encoder(setup), pillow_transform(setup.recipe)
    out.mkdir()
    side = setup.recipe.network.image
    encode(torch.zeros(setup.batch, 3, side, side, device=setup.device))
    features, start, options = {}, None, loader_options(setup)
    for slide in setup.slides:
        rows = []
        for images in DataLoader(Patches([slide], transform), setup.batch, **options):
            start = time.perf_counter() if start is None else start
            rows.append(encode(images.to(setup.device)).float().cpu().numpy())
        features[slide.path.stem] = np.concatenate(rows)
        np.save(out / f"{slide.path.stem}.npy", features[slide.path.stem])
    return Run(time.perf_counter() - start, sum(map(len, features.values())), features)


def loader_options(setup: Setup) -> dict[str, Any]:
    """Options of a DataLoader."""
    return {"num_workers": setup.workers, "pin_memory": setup.device == "cuda"}


def device_transform(recipe: Recipe) -> Callable:
    """Transform of uint8 patches [B, P, P, 3] on the device, channels last."""
    import torch
    from torch.nn.functional import interpolate

    wanted = recipe.transform
    keep = slice(wanted.margin, wanted.margin + wanted.crop)

    def transform(patches, mean, std):
        images = patches.permute(0, 3, 1, 2).to(mean.dtype)
        if images.shape[-1] != wanted.resize:
            images = interpolate(images, size=(wanted.resize,) * 2, mode=wanted.kind, antialias=True)
            images = torch.clamp(torch.round(images), 0, 255)
        return (images[..., keep, keep] / 255 - mean) / std

    return transform


class Tuned:
    """Compiled program of the tuned side, from uint8 patches to features; `network` and `transform` are its parts."""

    def __init__(self, setup: Setup) -> None:
        import torch

        self.setup, self.dtype = setup, torch.bfloat16 if setup.half else torch.float32
        model = load_model(setup).to(self.dtype, memory_format=torch.channels_last)
        given = setup.recipe.transform
        statistics = [torch.tensor(x, device=setup.device).reshape(3, 1, 1) for x in (given.mean, given.std)]
        transform, dtype = device_transform(setup.recipe), self.dtype
        self.transform = torch.compile(lambda patches: transform(patches, *statistics).to(dtype), dynamic=False)
        self.network = torch.compile(model, dynamic=False)
        self.whole = torch.compile(lambda patches: model(transform(patches, *statistics).to(dtype)), dynamic=False)

    def send(self, patches):
        """Patches on the device, transferred without waiting where they are pinned."""
        return patches.to(self.setup.device, non_blocking=True)

    def __call__(self, patches):
        """Features [B, F], perhaps not computed yet."""
        import torch

        with torch.inference_mode():
            return self.whole(self.send(patches)).float()


def as_bytes(image: Image.Image):
    """uint8 tensor [P, P, 3]."""
    import torch

    return torch.from_numpy(np.array(image))


def tuned(setup: Setup, slides: Path, out: Path) -> Run:
    """One loader over all slides, full batches, everything behind the pixels on the device."""
    import torch
    from torch.utils.data import DataLoader

    encode, size = Tuned(setup), setup.slides[0].size
    out.mkdir()
    encode(torch.zeros(setup.batch, size, size, 3, dtype=torch.uint8))
    rows, start, waiting = [], None, deque()
    options = loader_options(setup) | ({"prefetch_factor": 4} if setup.workers else {})
    for patches in DataLoader(Patches(setup.slides, as_bytes), setup.batch, **options):
        start, used = time.perf_counter() if start is None else start, len(patches)
        if used < setup.batch:
            patches = torch.cat([patches, patches.new_zeros(setup.batch - used, *patches.shape[1:])])
        waiting.append((encode(patches), used))
        if len(waiting) == IN_FLIGHT:
            rows.append(_fetched(*waiting.popleft()))
    rows += [_fetched(*each) for each in waiting]
    every, features = np.concatenate(rows), {}
    for slide, own in zip(setup.slides, _split(every, [len(slide.coords) for slide in setup.slides]), strict=True):
        features[slide.path.stem] = own
        np.save(out / f"{slide.path.stem}.npy", own)
    return Run(time.perf_counter() - start, len(every), features)


def _fetched(features, used: int) -> np.ndarray:
    return features[:used].cpu().numpy()


def _split(rows: np.ndarray, counts: list[int]) -> Iterator[np.ndarray]:
    yield from np.split(rows, np.cumsum(counts)[:-1])


def make_parser(about: str) -> argparse.ArgumentParser:
    """Parser of the options of a side or of its stages."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=(*SIDES, "weights", "decode"), required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--slides", type=Path)
    parser.add_argument("--tiles", type=Path, help="patches of the slides")
    parser.add_argument("--out", type=Path, help="folder for features")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, help="layers, instead of the encoder's")
    return parser


def make_setup(options: argparse.Namespace) -> Setup:
    """Input of a side from its options."""
    recipe = reduced(RECIPES[options.encoder], options.layers)
    slides = read_tiles(options.slides, options.tiles) if options.tiles else []
    return Setup(recipe, options.weights, slides, options.device, options.half, options.workers, options.batch)


def main() -> int:
    """Run a side; the last line of output is JSON, and the features are in OUT/features.npz."""
    options = make_parser(__doc__).parse_args()
    setup = make_setup(options)
    if options.side == "weights":
        write_weights(setup.recipe, setup.weights)
        return 0
    options.out.mkdir(parents=True)
    found = {"ours": ours, "plain": plain, "tuned": tuned}[options.side](setup, options.slides, options.out / "found")
    np.savez(options.out / "features.npz", **found.features)
    print(json.dumps({"seconds": found.seconds, "patches": found.patches} | found.more))
    return 0


if __name__ == "__main__":
    sys.exit(main())
