"""Published patch encoders by name: network, transform, weights, patch size, licence (`RECIPES`).

Facts come from the published model cards, configurations and loading code; `source` names the code that a recipe
follows where implementations differ. Nothing here downloads anything.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from pathflip_jax.vision.config import Transform, VisionConfig, swiglu_hidden

Layout = Literal["timm", "vit", "dinov2", "dinov3", "meta", "clip", "conch", "conch_v15", "keep"]

_BIN, _SAFETENSORS = ("pytorch_model.bin",), ("model.safetensors",)
_EITHER = _SAFETENSORS + _BIN


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Published encoder, and the way in which its features are made.

    `files` are the weight files of the Hugging Face `repository`, in order of preference, and `layout` their names of
    tensors (`convert/vision.py`). `patch_size` pixels at `mpp` micrometres per pixel are the patches that the encoder
    expects. `precision` is that of the published inference; `parameters` the number of weights that are used, without
    the biases of keys, which DINOv3 lacks and which are zeros here.
    """

    name: str
    repository: str
    files: tuple[str, ...]
    layout: Layout
    network: VisionConfig
    transform: Transform
    patch_size: int
    mpp: float = 0.5
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    parameters: int
    licence: str
    gated: bool = False
    source: str = ""
    note: str = ""

    @property
    def width(self) -> int:
        """Length of the feature vector."""
        return self.network.features


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5,) * 3, (0.5,) * 3)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
_LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))


def _transform(kind: Literal["bilinear", "bicubic"], statistics, resize: int = 224, crop: int = 224) -> Transform:
    mean, std = statistics
    return Transform(resize=resize, crop=crop, kind=kind, mean=mean, std=std)


_SMALL = VisionConfig(width=384, depth=12, heads=6, hidden=1536, patch=16)
_BASE = VisionConfig(width=768, depth=12, heads=12, hidden=3072, patch=16)
_LARGE = VisionConfig(width=1024, depth=24, heads=16, hidden=4096, patch=16)
_HUGE = VisionConfig(width=1280, depth=32, heads=16, hidden=3416, patch=14, feed_forward="swiglu")
_GIANT = VisionConfig(width=1536, depth=40, heads=24, hidden=4096, patch=14, feed_forward="swiglu")
_GIANT_REGISTERS = replace(_GIANT, registers=4, prefix_positions=0)

_NO_DERIVATIVES = "CC-BY-NC-ND-4.0"
_UNI = Recipe(
    name="uni_v1", repository="MahmoodLab/UNI", files=_BIN, layout="timm", network=_LARGE,
    transform=_transform("bilinear", _IMAGENET), patch_size=256, precision="float16", parameters=303_350_784,
    licence=_NO_DERIVATIVES, gated=True, source="mahmoodlab/TRIDENT",
)  # fmt: skip
_VIRCHOW = Recipe(
    name="virchow", repository="paige-ai/Virchow", files=_BIN, layout="timm",
    network=replace(_HUGE, pooling="class_and_mean"), transform=_transform("bicubic", _IMAGENET), patch_size=224,
    precision="float16", parameters=631_229_184, licence="Apache-2.0 with terms of use", gated=True,
    source="mahmoodlab/TRIDENT", note="class token and mean of the patches; some tools keep the class token alone",
)  # fmt: skip
_HOPTIMUS = Recipe(
    name="hoptimus0", repository="bioptimus/H-optimus-0", files=_BIN, layout="timm", network=_GIANT_REGISTERS,
    transform=_transform("bicubic", _BIOPTIMUS), patch_size=224, precision="float16", parameters=1_134_774_272,
    licence="Apache-2.0", source="bioptimus/H-optimus-0 model card",
)  # fmt: skip
_KAIKO = Recipe(
    name="kaiko_vits16", repository="1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
    files=_SAFETENSORS, layout="timm", network=replace(_SMALL, layer_scale=False),
    transform=_transform("bilinear", _HALF), patch_size=256, parameters=21_665_664,
    licence="Kaiko non-commercial", source="kaiko-ai/towards_large_pathology_fms",
)  # fmt: skip
_HIBOU_B = Recipe(
    name="hibou_b", repository="histai/hibou-b", files=_SAFETENSORS, layout="dinov2",
    network=replace(_BASE, patch=14, registers=4, feed_forward="swiglu", hidden=swiglu_hidden(768)),
    transform=_transform("bicubic", _HIBOU), patch_size=224, parameters=85_740_288, licence="Apache-2.0", gated=True,
    source="HistAI/hibou",
)  # fmt: skip
_DINOV2 = Recipe(
    name="dinov2_vits14", repository="facebook/dinov2-small", files=_EITHER, layout="dinov2",
    network=replace(_SMALL, patch=14, grid=37, resize="bicubic"),
    transform=_transform("bicubic", _IMAGENET, resize=256), patch_size=256, parameters=22_056_192,
    licence="Apache-2.0", source="transformers", note="trained on natural images",
)  # fmt: skip
_DINOV3 = Recipe(
    name="dinov3_vits16", repository="facebook/dinov3-vits16-pretrain-lvd1689m", files=_SAFETENSORS, layout="dinov3",
    network=replace(_SMALL, registers=4, rope=True, prefix_positions=0, eps=1e-5),
    transform=_transform("bilinear", _IMAGENET), patch_size=224, parameters=21_596_160, licence="DINOv3 licence",
    gated=True, source="transformers", note="trained on natural images",
)  # fmt: skip

_RECIPES = (
    _UNI,
    replace(
        _UNI, name="uni_v2", repository="MahmoodLab/UNI2-h", parameters=681_394_176, precision="bfloat16",
        network=replace(_GIANT, depth=24, registers=8, prefix_positions=0),
    ),
    Recipe(
        name="conch_v1", repository="MahmoodLab/CONCH", files=_BIN, layout="conch",
        network=replace(_BASE, image=448, layer_scale=False, pooling="attention", head_width=512),
        transform=_transform("bicubic", _CLIP, resize=448, crop=448), patch_size=512, parameters=87_567_104,
        licence=_NO_DERIVATIVES, gated=True, source="mahmoodlab/CONCH, without projection, as TRIDENT calls it",
        note="pooled vision features before the contrastive projection, not normalised",
    ),
    Recipe(
        name="conch_v15", repository="MahmoodLab/conchv1_5", files=("pytorch_model_vision.bin",), layout="conch_v15",
        network=replace(
            _LARGE, image=448, grid=14, resize="offset", pooling="attention", head_width=768, pooler_bias=False
        ),
        transform=_transform("bilinear", _IMAGENET, resize=448, crop=448), patch_size=512, precision="float16",
        parameters=306_109_184, licence=_NO_DERIVATIVES, gated=True, source="mahmoodlab/TRIDENT",
    ),
    _VIRCHOW,
    replace(
        _VIRCHOW, name="virchow2", repository="paige-ai/Virchow2", parameters=631_239_424,
        network=replace(_HUGE, pooling="class_and_mean", registers=4, prefix_positions=5),
    ),
    Recipe(
        name="gigapath", repository="prov-gigapath/prov-gigapath", files=_BIN, layout="timm",
        network=replace(_GIANT, patch=16), transform=_transform("bicubic", _IMAGENET, resize=256), patch_size=256,
        precision="float16", parameters=1_134_953_984, licence="Apache-2.0 with conditions", gated=True,
        source="prov-gigapath/prov-gigapath",
    ),
    _HOPTIMUS,
    replace(
        _HOPTIMUS, name="hoptimus1", repository="bioptimus/H-optimus-1", files=_EITHER, licence=_NO_DERIVATIVES,
        gated=True,
    ),
    replace(
        _HOPTIMUS, name="h0_mini", repository="bioptimus/H0-mini", files=_EITHER, licence=_NO_DERIVATIVES, gated=True,
        network=replace(_BASE, patch=14, feed_forward="swiglu", hidden=2048, registers=4, prefix_positions=0),
        parameters=85_739_520, note="class token; slide2vec adds the mean of the patches (1,536 numbers)",
    ),
    Recipe(
        name="gpfm", repository="majiabo/GPFM", files=("GPFM.pth",), layout="timm", network=replace(_LARGE, patch=14),
        transform=_transform("bicubic", _IMAGENET), patch_size=224, precision="float16", parameters=303_227_904,
        licence=_NO_DERIVATIVES, source="mahmoodlab/TRIDENT",
    ),
    _KAIKO,
    replace(
        _KAIKO, name="kaiko_vits8", repository=_KAIKO.repository.replace("patch16", "patch8"), parameters=21_670_272,
        network=replace(_KAIKO.network, patch=8),
    ),
    replace(
        _KAIKO, name="kaiko_vitb16", repository=_KAIKO.repository.replace("small", "base"), parameters=85_798_656,
        network=replace(_BASE, layer_scale=False),
    ),
    replace(
        _KAIKO, name="kaiko_vitb8", repository=_KAIKO.repository.replace("small_patch16", "base_patch8"),
        parameters=85_807_872, network=replace(_BASE, patch=8, layer_scale=False),
    ),
    replace(
        _KAIKO, name="kaiko_vitl14",
        repository="1aurent/vit_large_patch14_reg4_dinov2.kaiko_ai_towards_large_pathology_fms",
        network=replace(_LARGE, patch=14, registers=4, prefix_positions=0, grid=37), parameters=304_370_688,
    ),
    Recipe(
        name="lunit_vits8", repository="1aurent/vit_small_patch8_224.lunit_dino", files=_SAFETENSORS, layout="timm",
        network=replace(_SMALL, patch=8, layer_scale=False), transform=_transform("bicubic", _LUNIT), patch_size=224,
        parameters=21_670_272, licence="Lunit non-commercial", source="1aurent/vit_small_patch8_224.lunit_dino",
    ),
    Recipe(
        name="phikon", repository="owkin/phikon", files=_EITHER, layout="vit",
        network=replace(_BASE, layer_scale=False), transform=_transform("bilinear", _IMAGENET), patch_size=224,
        parameters=85_798_656,
        licence="Owkin non-commercial", source="owkin/phikon", note="class token, not the tanh layer after it",
    ),
    Recipe(
        name="phikon_v2", repository="owkin/phikon-v2", files=_SAFETENSORS, layout="dinov2",
        network=replace(_LARGE, resize="bicubic"), transform=_transform("bilinear", _IMAGENET), patch_size=224,
        parameters=303_350_784, licence="Owkin non-commercial", source="mahmoodlab/TRIDENT",
    ),
    _HIBOU_B,
    replace(
        _HIBOU_B, name="hibou_l", repository="histai/hibou-L", parameters=303_658_240,
        network=replace(_LARGE, patch=14, registers=4, feed_forward="swiglu", hidden=swiglu_hidden(1024)),
    ),
    Recipe(
        name="midnight12k", repository="kaiko-ai/midnight", files=_SAFETENSORS, layout="dinov2",
        network=replace(_GIANT, pooling="class_and_mean", resize="bicubic"), transform=_transform("bilinear", _HALF),
        patch_size=224, precision="float16", parameters=1_134_769_664, licence="MIT", source="kaiko-ai/midnight card",
        note="class token and mean of the patches; some tools keep the class token alone",
    ),
    Recipe(
        name="openmidnight", repository="SophontAI/OpenMidnight", files=("teacher_checkpoint_load.pt",), layout="meta",
        network=replace(_GIANT, registers=4), transform=_transform("bilinear", _IMAGENET), patch_size=224,
        precision="float16", parameters=1_134_775_808, licence="Apache-2.0", gated=True, source="mahmoodlab/TRIDENT",
    ),
    Recipe(
        name="keep", repository="Astaxanthin/KEEP", files=_EITHER, layout="keep",
        network=replace(_LARGE, head="mlp", head_width=768, unit_length=True),
        transform=_transform("bicubic", _IMAGENET), patch_size=256, precision="float16", parameters=304_728_576,
        licence="MIT", source="MAGIC-AI4Med/KEEP", note="vectors of length 1",
    ),
    Recipe(
        name="plip", repository="vinid/plip", files=_EITHER, layout="clip",
        network=replace(
            _BASE, patch=32, feed_forward="quick_gelu", layer_scale=False, pre_norm=True, eps=1e-5, head="linear",
            head_width=512,
        ),
        transform=_transform("bicubic", _CLIP), patch_size=224, parameters=87_849_216, licence="non-commercial",
        source="vinid/plip",
    ),
    _DINOV2,
    replace(
        _DINOV2, name="dinov2_vitb14", repository="facebook/dinov2-base", parameters=86_579_712,
        network=replace(_BASE, patch=14, grid=37, resize="bicubic"),
    ),
    replace(
        _DINOV2, name="dinov2_vitl14", repository="facebook/dinov2-large", parameters=304_367_616,
        network=replace(_LARGE, patch=14, grid=37, resize="bicubic"),
    ),
    replace(
        _DINOV2, name="dinov2_vitg14", repository="facebook/dinov2-giant", parameters=1_136_479_232,
        network=replace(_GIANT, grid=37, resize="bicubic"),
    ),
    _DINOV3,
    *(
        replace(
            _DINOV3, name=f"dinov3_{name}", repository=_DINOV3.repository.replace("vits16", name),
            parameters=parameters, network=replace(shape, registers=4, rope=True, prefix_positions=0, eps=1e-5),
        )
        for name, shape, parameters in (
            ("vitb16", _BASE, 85_659_648),
            ("vitl16", _LARGE, 303_128_576),
            ("vith16plus", replace(_HUGE, patch=16, heads=20, hidden=5120), 840_591_360),
        )
    ),
)  # fmt: skip

RECIPES = {recipe.name: recipe for recipe in _RECIPES}


def spelled(name: str) -> str:
    """Name without case and punctuation, in which tools differ: UNI2-h is uni2h, h0-mini is h0mini."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find_recipe(name: str) -> Recipe | None:
    """Recipe of a name or of a Hugging Face repository, however it is spelled; None for others."""
    return _BY_SPELLING.get(spelled(name))


def known_recipe(name: str) -> Recipe:
    """Recipe of a name. Raises ValueError that lists the registered ones for any other."""
    if (recipe := find_recipe(name)) is None:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"encoder {name!r} is not registered; {hint}Registered are {', '.join(RECIPES)}")
    return recipe


def registry_name(name: str) -> str:
    """Name of an encoder as the registry spells it; names of other encoders stay as they are."""
    recipe = find_recipe(name)
    return recipe.name if recipe else name


def _spellings(recipe: Recipe) -> set[str]:
    repository = recipe.repository
    names = (recipe.name, repository, repository.partition("/")[2], *OTHER_NAMES.get(recipe.name, ()))
    return {spelled(name) for name in names}


# Names under which TRIDENT, STAMP, slide2vec, AtlasPatch and LazySlide know an encoder, where they are not its own.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "uni_v1": ("uni", "mahmood-uni"),
    "uni_v2": ("uni2", "uni2-h", "mahmood-uni2-h"),
    "conch_v1": ("conch", "mahmood-conch"),
    "conch_v15": ("conch_v1_5", "conch1_5", "conchv15"),
    "gigapath": ("prov-gigapath", "provgigapath"),
    "hoptimus0": ("h-optimus-0", "h_optimus_0"),
    "hoptimus1": ("h-optimus-1", "h_optimus_1"),
    "h0_mini": ("h0-mini", "h_0_mini"),
    "kaiko_vits16": ("kaiko-vits16", "kaiko-s16"),
    "kaiko_vits8": ("kaiko-vits8", "kaiko-s8"),
    "kaiko_vitb16": ("kaiko-vitb16", "kaiko-b16"),
    "kaiko_vitb8": ("kaiko-vitb8", "kaiko-b8"),
    "kaiko_vitl14": ("kaiko-vitl14", "kaiko-l14"),
    "lunit_vits8": ("lunit-vits8", "lunit"),
    "midnight12k": ("midnight", "kaiko-midnight"),
    "hibou_b": ("hibou-b",),
    "hibou_l": ("hibou-l", "hibou"),
}

_BY_SPELLING = {spelling: recipe for recipe in _RECIPES for spelling in _spellings(recipe)}
