"""The losses of PathFLIP2 against sums pair by pair; chunks change nothing, slides of one case are excluded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.losses.pathflip2 import SigmoidLossConfig, pair_loss, pairs_bytes, sigmoid_slide_loss

B, K, D = 5, 3, 8
SCALE, BIAS = 7.0, -3.0


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def drawn(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def term(cosine, match):
    return np.logaddexp(0, -(1 if match else -1) * (SCALE * cosine + BIAS))


CASES = [np.arange(B), np.array([0, 1, 1, 3, 3])]


@pytest.mark.parametrize("case", CASES, ids=["all apart", "two cases of two slides"])
def test_slide_loss_is_the_sum_over_pairs_by_slide(case):
    slides, captions = drawn(B, D), drawn(1, B, D)[0]
    expected = sum(
        term(unit(slides)[i] @ unit(captions)[j], i == j)
        for i in range(B)
        for j in range(B)
        if i == j or case[i] != case[j]
    )
    assert float(sigmoid_slide_loss(*map(jnp.asarray, (slides, captions, case)), SCALE, BIAS)) == pytest.approx(
        expected / B, rel=1e-5
    )


@pytest.mark.parametrize("case", CASES, ids=["all apart", "two cases of two slides"])
@pytest.mark.parametrize("at_once", [0, 1, 2, 5, 9])
def test_pair_loss_is_the_mean_over_pairs_whatever_stands_in_memory(case, at_once):
    pooled, texts = drawn(B, K, D), drawn(1, B, K, D)[0]
    terms, matches, others = [], [], []
    for i, j in np.ndindex(B, B):
        for k, m in np.ndindex(K, K):
            if i == j or case[i] != case[j]:
                cosine = unit(pooled)[i, k] @ unit(texts)[j, m]
                terms.append(term(cosine, (i, k) == (j, m)))
                (matches if (i, k) == (j, m) else others).append(cosine)
    config = SigmoidLossConfig(slides_at_once=at_once)
    loss, cosines = jax.jit(lambda p, t: pair_loss(p, t, jnp.asarray(case), SCALE, BIAS, config))(pooled, texts)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(cosines["cosine_positive"]) == pytest.approx(np.mean(matches), abs=1e-5)
    assert float(cosines["cosine_negative"]) == pytest.approx(np.sum(others) / max(len(terms) - B * K, 1), abs=1e-5)

    def gradients(config):
        return jax.grad(lambda *x: pair_loss(*x, jnp.asarray(case), SCALE, BIAS, config)[0], argnums=(0, 1))(
            pooled, texts
        )

    for ours, whole in zip(gradients(config), gradients(SigmoidLossConfig()), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-6)


@pytest.mark.parametrize("at_once", [0, 2])
def test_shared_captions_and_subcaptions_are_no_negatives(at_once):
    """Slides are related by an equal number in any column; only subcaptions equal to the slide's own are excluded."""
    pooled, texts = drawn(B, K, D), drawn(1, B, K, D)[0]
    related = np.array([[0, 7], [1, 7], [2, 2], [3, 3], [4, 4]])
    wording = np.array([[1, 2, 3], [4, 5, 6], [2, 8, 9], [10, 10, 12], [13, 9, 9]])
    terms = []
    for i, j in np.ndindex(B, B):
        for k, m in np.ndindex(K, K):
            if i == j or not (set(related[i]) & set(related[j]) or wording[j, m] in wording[i]):
                terms.append(term(unit(pooled)[i, k] @ unit(texts)[j, m], (i, k) == (j, m)))
    config = SigmoidLossConfig(slides_at_once=at_once)
    loss, _ = jax.jit(lambda p, t: pair_loss(p, t, related, SCALE, BIAS, config, wording=wording))(pooled, texts)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    slides, captions = pooled[:, 0], texts[:, 0]
    pairs = [(i, j) for i, j in np.ndindex(B, B) if i == j or {i, j} != {0, 1}]
    expected = sum(term(unit(slides)[i] @ unit(captions)[j], i == j) for i, j in pairs) / B
    assert float(sigmoid_slide_loss(slides, captions, related, SCALE, BIAS)) == pytest.approx(expected, rel=1e-5)


def test_settings_and_what_they_bound():
    assert pairs_bytes(SigmoidLossConfig(), 4, 64, 8) == 4 * 4 * 64 * 64
    assert pairs_bytes(SigmoidLossConfig(slides_at_once=16), 4, 64, 8) == 4 * 4 * 16 * 64
    assert pairs_bytes(SigmoidLossConfig(region_weight=0), 4, 64, 8) == 0
    for wrong in ({"slide": "clip"}, {"region": "all"}, {"slides_at_once": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SigmoidLossConfig(**wrong)
