"""PyTorch patch encoders: timm models and Hugging Face vision folders.

Each preprocesses pixels by its own configuration (size, crop, mean, standard deviation) and returns its pooled
features. Only weights are loaded, never code: `trust_remote_code` stays off.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from pathflip_jax.runtime.workers import worker_number

_BATCH = 64  # patches per batch: 64 of 224 px fit any GPU along with a large model


class HuggingFace:
    """Vision model in a Hugging Face folder (config.json, weights, preprocessor_config.json).

    Pooled features are the model's own pooled output; where that is a tanh layer over [CLS], trained for
    another purpose or not at all (ViT and its kin), the last [CLS] itself, as pathology models of that
    family are used. Raises ValueError for a folder that is not a vision model or lacks weights.
    """

    def __init__(self, folder: str | Path, half: bool = False) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel
            from transformers.utils import logging
        except ImportError as error:
            raise ImportError(
                f"encoder hf:{folder} needs transformers ({error}); install it with "
                "`pip install pathflip-jax[encoders]`"
            ) from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder}: not a vision model that transformers loads ({error}); expected config.json, "
                "preprocessor_config.json and model.safetensors of a released model"
            ) from error
        model = getattr(model, "vision_model", model)  # the vision half of an image-text model
        self._cls = hasattr(getattr(model, "pooler", None), "dense")
        missing = sorted(key for key in loading["missing_keys"] if not (self._cls and key.startswith("pooler.")))
        if missing:
            raise ValueError(
                f"{folder}: the weights lack {len(missing)} tensors ({', '.join(missing[:3])}, ...) and random ones "
                "would replace them; download the folder again"
            )
        self.name = f"hf:{Path(folder).resolve().name}"
        self._run = _Runner(model, half)
        self.dim = self(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]

    def recipe_facts(self) -> dict[str, str]:
        """Precision of the features."""
        return {"precision": self._run.precision}

    def __call__(self, patches: UInt8[np.ndarray, "n P P 3"]) -> Float[np.ndarray, "n F"]:
        """Encode a batch of patches."""
        return self._run(patches, self._pixels, self._pool)

    def _pixels(self, patches: np.ndarray) -> torch.Tensor:
        return self._processor(
            images=list(patches), return_tensors="pt", input_data_format="channels_last"
        ).pixel_values

    def _pool(self, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        output = model(pixel_values=pixels)
        pooled = None if self._cls else getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


class Timm:
    """Timm model by name (weights downloaded once), by `hf-hub:OWNER/NAME`, or from a local timm folder.

    Features before the classifier, pooled as in the model's head.
    """

    def __init__(self, model: str, half: bool = False) -> None:
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
            raise ImportError(
                f"encoder timm:{model} needs timm and the torchvision that fits this torch ({error}); "
                "install them with `pip install pathflip-jax[encoders]`"
            ) from error
        local = Path(model).is_dir()
        try:
            network = timm.create_model(f"local-dir:{model}" if local else model, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"encoder timm:{model}: timm cannot load it ({error}); expected a name that `timm.list_models"
                "(pretrained=True)` lists, hf-hub:OWNER/NAME, or a folder with config.json and weights. "
                "Offline, download the folder first; gated models need `hf auth login`"
            ) from error
        self._transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
        self.name = f"timm:{Path(model).resolve().name if local else model}"
        self._run = _Runner(network, half)
        self.dim = self(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]

    def recipe_facts(self) -> dict[str, str]:
        """Precision of the features."""
        return {"precision": self._run.precision}

    def __call__(self, patches: UInt8[np.ndarray, "n P P 3"]) -> Float[np.ndarray, "n F"]:
        """Encode a batch of patches."""
        return self._run(patches, self._pixels, lambda model, pixels: model(pixels))

    def _pixels(self, patches: np.ndarray) -> torch.Tensor:
        return torch.stack([self._transform(Image.fromarray(patch)) for patch in patches])


def best_device() -> torch.device:
    """GPU assigned to this worker process, among those visible to torch; else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", worker_number() % gpus) if gpus else torch.device("cpu")


class _Runner:
    """Frozen network on the best device, run in batches; half precision is float16 on CUDA and bfloat16 elsewhere."""

    def __init__(self, model: torch.nn.Module, half: bool) -> None:
        self._device = best_device()
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._half = half

    @property
    def precision(self) -> str:
        """Type that matrix products are computed in."""
        half = "float16" if self._device.type == "cuda" else "bfloat16"
        return half if self._half else "float32"

    def __call__(self, patches: np.ndarray, pixels, pool) -> np.ndarray:
        dtype = torch.float16 if self._device.type == "cuda" else torch.bfloat16
        rows = []
        with torch.inference_mode(), torch.autocast(self._device.type, dtype, enabled=self._half):
            for start in range(0, len(patches), _BATCH):
                batch = pixels(patches[start : start + _BATCH]).to(self._device)
                rows.append(pool(self._model, batch).float())  # the GPU computes while the next batch is prepared
            return torch.cat(rows).cpu().numpy()
