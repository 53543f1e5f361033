"""Rotary positions against DINOv3's of transformers, and against complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.positions import rotary_angles, rotated

CONFIG = VisionConfig(
    width=64, depth=1, heads=2, hidden=64, patch=16, image=80, registers=4, prefix_positions=0, rope=True
)
N, PREFIX = CONFIG.side**2, CONFIG.prefix
ROWS = np.random.default_rng(0).normal(size=(2, PREFIX + N, 2, 32)).astype(np.float32)


def test_rotation_is_that_of_dinov3():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit", reason="no DINOv3")
    config = dinov3.DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=16, image_size=80)
    embedding = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = embedding(torch.zeros(1, 3, 80, 80))
    rows = torch.from_numpy(ROWS).transpose(1, 2)
    theirs = dinov3.apply_rotary_pos_emb(rows, rows, cos, sin)[0].transpose(1, 2)
    ours = rotated(jnp.asarray(ROWS), rotary_angles(CONFIG), PREFIX)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_pairs_of_channels_turn_by_row_and_column():
    """Channel i and i + h/2 are a complex number; the first quarter turns with y, the second with x."""
    ours = np.asarray(rotated(jnp.asarray(ROWS), rotary_angles(CONFIG), PREFIX))
    np.testing.assert_array_equal(ours[:, :PREFIX], ROWS[:, :PREFIX])
    for patch, head in ((0, 0), (7, 1), (N - 1, 0)):
        y, x = (2 * (place + 0.5) / CONFIG.side - 1 for place in divmod(patch, CONFIG.side))
        for channel in range(16):
            angle = 2 * np.pi * (y if channel < 8 else x) / 100 ** ((channel % 8) / 8)
            before, after = (rows[1, PREFIX + patch, head] for rows in (ROWS, ours))
            turned = (before[channel] + 1j * before[channel + 16]) * np.exp(1j * angle)
            np.testing.assert_allclose(after[channel] + 1j * after[channel + 16], turned, atol=1e-5)


def test_rotation_keeps_the_dtype():
    assert rotated(jnp.asarray(ROWS, jnp.bfloat16), rotary_angles(CONFIG), PREFIX).dtype == jnp.bfloat16
