"""Competent PyTorch baseline: the best PyTorch that a good engineer would write in a day.

It encodes all regions in one call, projects keys and values once for slide and regions, uses fused attention, pads
texts only to the longest of their batch, and has one vectorised loss and `torch.compile`. It is the module of an export
(`convert/torch_model.py`) with a loss on top; only the techniques specific to our JAX code are missing: absorbed
projections and packed texts.
"""

import torch
from released_style import contrast
from torch import Tensor
from torch.nn import functional

from pathflip_jax.convert import torch_model


class CompetentTorch(torch_model.PathFLIP):
    """Model of `torch_model` with the losses of DESIGN section 4 and the released normaliser."""

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(slide loss, region loss) of a batch whose texts are trimmed to the longest."""
        encoded = self.encode_slides(batch["patches"])
        B, K, T = batch["subcaption_ids"].shape
        captions = self.encode_texts(batch["caption_ids"], batch["caption_mask"])
        flat = [batch[name].reshape(B * K, T) for name in ("subcaption_ids", "subcaption_mask")]
        subcaptions = self.encode_texts(*flat).reshape(B, K, -1)
        own = torch.eye(B, dtype=torch.bool, device=subcaptions.device)
        drawn = subcaptions[torch.arange(B, device=own.device), batch["negatives"].clamp(min=0)]  # [B, B, D]
        texts = torch.cat([subcaptions, drawn], dim=1)
        pooled, _ = self.fg_head(texts, encoded.regions, encoded.region_mask)
        z = self.logit_scale * (functional.normalize(pooled, dim=-1) * functional.normalize(texts, dim=-1)).sum(-1)
        terms = torch.cat([-functional.logsigmoid(z[:, :K]), -functional.logsigmoid(-z[:, K:]) * ~own], dim=1)
        return contrast(encoded.slide, captions), terms.sum() / (K + B - 1)


def trim(ids: Tensor, mask: Tensor, multiple: int = 8) -> tuple[Tensor, Tensor]:
    """Texts [..., T] without the padding that all of them share; the length stays a multiple of eight tokens."""
    longest = int(mask.sum(-1).max())
    length = min(-(-longest // multiple) * multiple, ids.shape[-1])
    return ids[..., :length].contiguous(), mask[..., :length].contiguous()
