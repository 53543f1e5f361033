"""Reading of files of transformers 4 and its PEFT (tests/golden/transformers4, kept by the peer of that name)."""

from pathlib import Path

import numpy as np

from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.convert.lora import attach, load_peft
from pathflip_jax.model.parameters import flatten, unflatten

KEPT = Path(__file__).parents[1] / "golden" / "transformers4"


def test_a_decoder_and_an_adapter_of_transformers_4_give_its_logits():
    expected = dict(np.load(KEPT / "logits.npz"))
    plain = load_decoder(KEPT / "decoder")
    np.testing.assert_allclose(plain(expected["tokens"])[0], expected["plain"], rtol=0, atol=2e-5)
    adapter, lora = load_peft(KEPT / "adapter", KEPT / "decoder")
    adapted = unflatten(load_decoder(KEPT / "decoder", lora=lora), attach(flatten(plain), adapter))
    np.testing.assert_allclose(adapted(expected["tokens"])[0], expected["adapted"], rtol=0, atol=2e-5)
    assert np.abs(expected["adapted"] - expected["plain"]).max() > 0.01
