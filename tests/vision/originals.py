"""Original classes of the registered patch encoders, with random weights: `python originals.py OUT PATCHES`.

Runs in a process of its own, since timm needs torchvision, whose build on the package index imports beside a CPU build
of torch only after two of its operators are declared. OUT/NAME gets the weights as they are published
(true width, two layers), and features.npz: by size, the features that the original makes of the patches in the file
PATCHES, and its input of the smallest.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its build does not fit the one of torch; what fails is to register what these would do
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import transformers  # noqa: E402
from timm.layers import SwiGLUPacked  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision import transforms  # noqa: E402

DEPTH = 2
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
KINDS = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}


def transform(kind: str, statistics, resize: int = 224, crop: int = 224) -> Callable[[Image.Image], torch.Tensor]:
    """torchvision's transform, as the model cards write it."""
    mean, std = statistics
    steps = [transforms.Resize(resize, interpolation=KINDS[kind]), transforms.CenterCrop(crop)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights drawn so that every parameter matters, those that start at zero or one too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim > 1 and "embed" not in name and "token" not in name
            is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "lambda1"))
            parameter.normal_(float(is_scale), 1.2 / parameter[0].numel() ** 0.5 if is_matrix else 0.5)
    return model.eval()


def vit(**options) -> VisionTransformer:
    """timm's class with the arguments of the model cards; reduced depth."""
    defaults = dict(img_size=224, init_values=1e-5, num_classes=0, dynamic_img_size=True)
    return VisionTransformer(**defaults | options | {"depth": DEPTH})


SWIGLU = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)
SMALL, BASE, LARGE = (dict(embed_dim=width, num_heads=heads) for width, heads in ((384, 6), (768, 12), (1024, 16)))
HUGE = dict(patch_size=14, embed_dim=1280, num_heads=16, mlp_ratio=5.3375, global_pool="", **SWIGLU)
GIANT = dict(embed_dim=1536, num_heads=24, mlp_ratio=5.33334, **SWIGLU)
REGISTERS = dict(reg_tokens=4, no_embed_class=True)


class ClassAndMean(torch.nn.Module):
    """Class token and mean of the patches of a model that returns all tokens."""

    def __init__(self, model: torch.nn.Module, prefix: int) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, I, I] -> [B, 2d]."""
        tokens = self.model(images)
        return torch.cat([tokens[:, 0], tokens[:, self.prefix :].mean(1)], -1)


class HuggingFace(torch.nn.Module):
    """Last hidden state of a transformers model: the class token, or with the mean of the patches."""

    def __init__(self, model: torch.nn.Module, mean: bool = False, **options) -> None:
        super().__init__()
        self.model, self.mean, self.options = model, mean, options

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, I, I] -> [B, F]."""
        tokens = self.model(pixel_values=images, **self.options).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1) if self.mean else tokens[:, 0]


class ConchPooler(torch.nn.Module):
    """Attentional pooler of CONCH 1, computed as published."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(1, 512))
        self.attn = torch.nn.MultiheadAttention(512, 8, kdim=768, vdim=768)
        self.ln_q, self.ln_k = torch.nn.LayerNorm(512), torch.nn.LayerNorm(768)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, 768] -> [B, 512]."""
        keys = self.ln_k(tokens).transpose(0, 1)
        query = self.ln_q(self.query)[:, None].expand(-1, keys.shape[1], -1)
        return self.attn(query, keys, keys, need_weights=False)[0][0]


class Conch15Pooler(torch.nn.Module):
    """Attentional pooler of CONCH 1.5, computed as published: no biases, keys and values in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(1, 768))
        self.ln_q, self.ln_k = torch.nn.LayerNorm(768), torch.nn.LayerNorm(1024)
        self.to_q, self.to_kv, self.to_out = (
            torch.nn.Linear(*sizes, bias=False) for sizes in ((768, 768), (1024, 1536), (768, 768))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, 1024] -> [B, 768]."""
        query, (key, value) = self.to_q(self.ln_q(self.query)), self.to_kv(self.ln_k(tokens)).chunk(2, -1)
        query = query.expand(len(tokens), -1, -1)
        query, key, value = (x.unflatten(-1, (8, 96)).transpose(1, 2) for x in (query, key, value))
        weights = (query @ key.transpose(2, 3) * 96**-0.5).softmax(-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))[:, 0]


class Conch(torch.nn.Module):
    """CONCH's vision tower without projection: trunk, attentional pooler, layer normalisation."""

    def __init__(self, trunk: VisionTransformer, pooler: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.attn_pool_contrast, self.ln_contrast = trunk, pooler, torch.nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 448, 448] -> [B, F]."""
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(images)))


class OffsetPositions(torch.nn.Module):
    """Conch 1.5 with its table of 14 x 14 patches resampled to 28 x 28 by Meta's offset of 0.1, as TRIDENT does."""

    def __init__(self, model: Conch) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 448, 448] -> [B, F]."""
        trunk, kept = self.model.trunk, self.model.trunk.pos_embed.data
        patches = kept[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        scale = (28 + 0.1) / 14
        patches = torch.nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
        larger = torch.cat([kept[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 784, -1)], 1)
        try:
            trunk.pos_embed.data, trunk.dynamic_img_size, trunk.patch_embed.strict_img_size = larger, False, False
            trunk.patch_embed.flatten, trunk.patch_embed.output_fmt = True, timm.layers.Format.NCHW
            return self.model(images)
        finally:
            trunk.pos_embed.data = kept


class Keep(torch.nn.Module):
    """KEEP's image half: trunk, two layers, vectors of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = vit(**LARGE)
        self.visual_head = torch.nn.Sequential(torch.nn.Linear(1024, 768), torch.nn.GELU(), torch.nn.Linear(768, 768))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] -> [B, 768]."""
        return torch.nn.functional.normalize(self.visual_head(self.visual(images)), dim=-1)


class Clip(torch.nn.Module):
    """Image embedding of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=DEPTH, patch_size=32, projection_dim=512
        )
        self.model = transformers.CLIPVisionModelWithProjection(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] -> [B, 512]."""
        return self.model(pixel_values=images).image_embeds


def dinov2(width: int, heads: int, registers: int = 0, **options) -> torch.nn.Module:
    """transformers' DINOv2, with registers or without."""
    kind = "WithRegisters" if registers else ""
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"Dinov2{kind}Config")(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=DEPTH, **more, **options
    )
    return getattr(transformers, f"Dinov2{kind}Model")(config)


def dinov3(width: int, heads: int, hidden: int, gated: bool = False) -> torch.nn.Module:
    """transformers' DINOv3."""
    config = transformers.DINOv3ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=hidden, use_gated_mlp=gated,
        num_hidden_layers=DEPTH, num_register_tokens=4, hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    return transformers.DINOv3ViTModel(config)


def phikon() -> torch.nn.Module:
    """transformers' ViT with the settings of Phikon's config."""
    return transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=DEPTH, layer_norm_eps=1e-6))


def meta_names(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """Weights of timm's giant with four registers, as Meta's DINOv2 names and stores them."""
    renamed = {"reg_token": "register_tokens"}
    state = {renamed.get(name, name): tensor for name, tensor in model.state_dict().items()}
    state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor for name, tensor in state.items()}
    # Meta adds the first row of its table to the class token; timm has it in the class token.
    row = torch.randn(1, 1, model.embed_dim)
    state |= {"pos_embed": torch.cat([row, state["pos_embed"]], 1), "cls_token": state["cls_token"] - row}
    return state | {"mask_token": torch.zeros(1, model.embed_dim)}


def bin_file(model: torch.nn.Module, folder: Path, name: str = "pytorch_model.bin", prefix: str = "") -> None:
    """Save weights as torch.save does."""
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, folder / name)


def safetensors_file(model: torch.nn.Module, folder: Path, prefix: str = "") -> None:
    """Save weights as one file of safetensors."""
    state = {f"{prefix}{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def hub_folder(model: torch.nn.Module, folder: Path) -> None:
    """Save a transformers model as its library does."""
    getattr(model, "model", model).save_pretrained(folder)


def meta_file(model: torch.nn.Module, folder: Path) -> None:
    """Save weights under Meta's names."""
    torch.save(meta_names(model), folder / "teacher_checkpoint_load.pt")


def sharded_folder(model: torch.nn.Module, folder: Path) -> None:
    """Save a transformers model in several files with an index."""
    model.model.save_pretrained(folder, max_shard_size="40MB")


def conch_v1() -> Conch:
    """CONCH 1's tower: a trunk without LayerScale for 448 pixels."""
    return Conch(vit(img_size=448, init_values=None, **BASE), ConchPooler(), 512)


IMAGES_OF_UNI = transform("bilinear", IMAGENET)
IMAGES_OF_DINOV2 = transform("bicubic", IMAGENET, 256)
DINOV2_GIANT = partial(dinov2, 1536, 24, patch_size=14, use_swiglu_ffn=True, layer_norm_eps=1e-6)

# Of each encoder: its class, its transform, the way in which its weights are saved.
ORIGINALS = {
    "uni_v1": (lambda: vit(**LARGE), IMAGES_OF_UNI, bin_file),
    "uni_v2": (
        lambda: vit(patch_size=14, reg_tokens=8, no_embed_class=True, **GIANT), IMAGES_OF_UNI, bin_file
    ),
    "conch_v1": (conch_v1, transform("bicubic", CLIP, 448, 448), partial(bin_file, prefix="visual.")),
    "conch_v15": (
        lambda: OffsetPositions(Conch(vit(**LARGE), Conch15Pooler(), 768)), transform("bilinear", IMAGENET, 448, 448),
        lambda model, folder: bin_file(model.model, folder, "pytorch_model_vision.bin"),
    ),
    "virchow": (
        lambda: ClassAndMean(vit(**HUGE), 1), transform("bicubic", IMAGENET),
        lambda model, folder: bin_file(model.model, folder),
    ),
    "virchow2": (
        lambda: ClassAndMean(vit(reg_tokens=4, **HUGE), 5), transform("bicubic", IMAGENET),
        lambda model, folder: bin_file(model.model, folder),
    ),
    "gigapath": (lambda: vit(patch_size=16, **GIANT), transform("bicubic", IMAGENET, 256), bin_file),
    "hoptimus0": (lambda: vit(patch_size=14, **GIANT, **REGISTERS), transform("bicubic", BIOPTIMUS), bin_file),
    "hoptimus1": (lambda: vit(patch_size=14, **GIANT, **REGISTERS), transform("bicubic", BIOPTIMUS), safetensors_file),
    "h0_mini": (
        lambda: vit(patch_size=14, mlp_ratio=5.33334, **BASE, **REGISTERS, **SWIGLU), transform("bicubic", BIOPTIMUS),
        safetensors_file,
    ),
    "gpfm": (
        lambda: vit(patch_size=14, **LARGE), transform("bicubic", IMAGENET), partial(bin_file, name="GPFM.pth"),
    ),
    "kaiko_vits16": (lambda: vit(init_values=None, **SMALL), transform("bilinear", HALF), safetensors_file),
    "kaiko_vits8": (
        lambda: vit(patch_size=8, init_values=None, **SMALL), transform("bilinear", HALF), safetensors_file,
    ),
    "kaiko_vitb16": (lambda: vit(init_values=None, **BASE), transform("bilinear", HALF), safetensors_file),
    "kaiko_vitb8": (lambda: vit(patch_size=8, init_values=None, **BASE), transform("bilinear", HALF), safetensors_file),
    "kaiko_vitl14": (
        lambda: vit(img_size=518, patch_size=14, **LARGE, **REGISTERS), transform("bilinear", HALF), safetensors_file,
    ),
    "lunit_vits8": (
        lambda: vit(patch_size=8, init_values=None, **SMALL), transform("bicubic", LUNIT), safetensors_file,
    ),
    "phikon": (lambda: HuggingFace(phikon()), IMAGES_OF_UNI, hub_folder),
    "phikon_v2": (
        lambda: HuggingFace(dinov2(1024, 16, image_size=224, patch_size=16)), IMAGES_OF_UNI, sharded_folder,
    ),
    "hibou_b": (
        lambda: HuggingFace(dinov2(768, 12, 4, image_size=224, patch_size=14, use_swiglu_ffn=True)),
        transform("bicubic", HIBOU), hub_folder,
    ),
    "hibou_l": (
        lambda: HuggingFace(dinov2(1024, 16, 4, image_size=224, patch_size=14, use_swiglu_ffn=True)),
        transform("bicubic", HIBOU), hub_folder,
    ),
    "midnight12k": (
        lambda: HuggingFace(DINOV2_GIANT(image_size=518), mean=True), transform("bilinear", HALF), hub_folder,
    ),
    "openmidnight": (
        lambda: vit(patch_size=14, **GIANT, **REGISTERS), IMAGES_OF_UNI, meta_file,
    ),
    "keep": (Keep, transform("bicubic", IMAGENET), bin_file),
    "plip": (Clip, transform("bicubic", CLIP), hub_folder),
    "dinov2_vits14": (
        lambda: HuggingFace(dinov2(384, 6, image_size=518, patch_size=14)), IMAGES_OF_DINOV2, hub_folder,
    ),
    "dinov2_vitb14": (
        lambda: HuggingFace(dinov2(768, 12, image_size=518, patch_size=14)), IMAGES_OF_DINOV2, hub_folder,
    ),
    "dinov2_vitl14": (
        lambda: HuggingFace(dinov2(1024, 16, image_size=518, patch_size=14)), IMAGES_OF_DINOV2, hub_folder,
    ),
    "dinov2_vitg14": (lambda: HuggingFace(DINOV2_GIANT(image_size=518)), IMAGES_OF_DINOV2, hub_folder),
    "dinov3_vits16": (lambda: HuggingFace(dinov3(384, 6, 1536)), IMAGES_OF_UNI, hub_folder),
    "dinov3_vitb16": (lambda: HuggingFace(dinov3(768, 12, 3072)), IMAGES_OF_UNI, hub_folder),
    "dinov3_vitl16": (lambda: HuggingFace(dinov3(1024, 16, 4096)), IMAGES_OF_UNI, hub_folder),
    "dinov3_vith16plus": (lambda: HuggingFace(dinov3(1280, 20, 5120, gated=True)), IMAGES_OF_UNI, hub_folder),
}  # fmt: skip


def main(out: Path, patches: Path) -> None:
    """Write weights and features of all originals."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with np.load(patches) as file:
        pixels = {size: list(map(Image.fromarray, file[size])) for size in file}
    for name, (make, images_of, save) in ORIGINALS.items():
        torch.manual_seed(0)
        model, folder = randomised(make()), out / name
        folder.mkdir()
        save(model, folder)
        images = torch.stack([images_of(patch) for patches in pixels.values() for patch in patches])
        with torch.inference_mode():
            features = model(images).numpy()
        count = len(images) // len(pixels)
        features = {size: features[i * count : (i + 1) * count] for i, size in enumerate(pixels)}
        np.savez(folder / "features.npz", images=images[:count].permute(0, 2, 3, 1).numpy(), **features)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
