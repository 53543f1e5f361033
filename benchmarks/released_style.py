"""Reference baseline: eager PyTorch in the style of the paper's released code, with the same weights as ours.

Per slide and step, it makes one Q-Former pass over all patches, then one pass per region in a Python loop. Keys and
values of the patches are projected again in every pass and layer, attention is written out and its probabilities are
kept, every text is padded to the maximum, and the region loss is computed slide by slide. Parameters and names are
those of `convert/torch_model.py`, so that both, and our own model, can load the same weights and must give the same
results (tests/benchmarks).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathflip_jax.convert import torch_model

CAPTION_LENGTH, SUBCAPTION_LENGTH = 384, 192  # padded length in the released code


class ReleasedStyle(torch_model.PathFLIP):
    """The model of `torch_model`, computed as in the released code; every pass stores its attention maps in `maps`."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.maps: list[Tensor] = []

    def encode_slide_batch(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Slides [B, R, S, F], every slot a patch -> slides [B, D], regions [B, R, D]."""
        self.maps = []
        patches = self.path_encoder(patches)
        B, R, S, D = patches.shape
        slide = self._queries(patches.reshape(B, R * S, D))
        regions = [self._queries(patches[:, r]) for r in range(R)]
        x = self.path_trans(torch.stack([slide, *regions], dim=1))
        return x[:, 0], x[:, 1:]

    def _queries(self, patches: Tensor) -> Tensor:
        """The query tokens over patches [B, N, D], pooled and projected: [B, D]."""
        x = self.Qformer.bert.embeddings(self.query_tokens.expand(len(patches), -1, -1))
        for layer in self.Qformer.bert.encoder.layer:
            x = self._attention(layer.attention, x, x, None)
            if layer.crossattention is not None:
                x = self._attention(layer.crossattention, x, patches, None)
            x = layer.output_query(layer.intermediate_query(x), x)
        return self.path_proj(x.mean(1))

    def encode_padded_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts [n, T], padded to the maximum -> [n, D]."""
        embeddings = self.Qformer.bert.embeddings
        x = embeddings.word_embeddings(ids) + embeddings.position_embeddings(embeddings.position_ids[:, : ids.shape[1]])
        x = embeddings(x)
        hidden = (1.0 - mask[:, None, None].to(x.dtype)) * -10000.0
        for layer in self.Qformer.bert.encoder.layer:
            x = self._attention(layer.attention, x, x, hidden)
            x = layer.output(layer.intermediate(x), x)
        return self.text_proj(x[:, 0])

    def _attention(self, block: nn.Module, x: Tensor, source: Tensor, hidden: Tensor | None) -> Tensor:
        query = block.split(block.self.query(x))
        key, value = block.split(block.self.key(source)), block.split(block.self.value(source))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if hidden is not None:
            scores = scores + hidden
        probabilities = scores.softmax(-1)
        self.maps.append(probabilities)
        pooled = functional.dropout(probabilities, block.rate, self.training) @ value
        return block.output(pooled.transpose(1, 2).flatten(2), x)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(slide loss, region loss) of a batch: DESIGN section 4 with the released normaliser."""
        slides, regions = self.encode_slide_batch(batch["patches"])
        captions = self.encode_padded_texts(batch["caption_ids"], batch["caption_mask"])
        B, K, T = batch["subcaption_ids"].shape
        flat = [batch[name].reshape(B * K, T) for name in ("subcaption_ids", "subcaption_mask")]
        subcaptions = self.encode_padded_texts(*flat).reshape(B, K, -1)
        region = sum(self._region_loss(i, regions, subcaptions, batch["negatives"]) for i in range(B))
        return contrast(slides, captions), region / (K + B - 1)

    def _region_loss(self, i: int, regions: Tensor, subcaptions: Tensor, negatives: Tensor) -> Tensor:
        B, K, _ = subcaptions.shape
        others = [subcaptions[j, negatives[i, j]] for j in range(B) if j != i]
        texts = torch.cat([subcaptions[i], *(text[None] for text in others)])[None]  # [1, K+B-1, D]
        source = regions[i : i + 1]
        head = self.fg_head
        pooled, weights = head.attn(head.w_q(texts), head.w_k(source), head.w_v(source))
        self.maps.append(weights)
        cosine = (functional.normalize(pooled, dim=-1) * functional.normalize(texts, dim=-1)).sum(-1)[0]
        labels = torch.cat([cosine.new_ones(K), -cosine.new_ones(B - 1)])
        return -functional.logsigmoid(labels * self.logit_scale * cosine).sum()


def contrast(slides: Tensor, captions: Tensor, temperature: float = 0.1, smoothing: float = 0.1) -> Tensor:
    """InfoNCE between slides and captions [B, D], mean of both directions."""
    logits = functional.normalize(slides, dim=-1) @ functional.normalize(captions, dim=-1).T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    return (
        functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        + functional.cross_entropy(logits.T, labels, label_smoothing=smoothing)
    ) / 2
