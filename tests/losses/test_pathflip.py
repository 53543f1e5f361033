"""The losses against slow loops in NumPy and against PyTorch's cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.losses.pathflip import (
    CosinePooling,
    Embeddings,
    LossConfig,
    alignment_loss,
    draw_negatives,
    normalise,
    pair_bytes,
    region_loss,
    slide_loss,
)

B, R, K, D = 5, 3, 2, 8
CASE = jnp.array([4, 1, 4, 2, 3])  # slides 0 and 2 are of one patient
APART = jnp.arange(B)
SHARED = jnp.array([[4, 9], [1, 9], [4, 4], [2, 8], [8, 3]])  # slides are related by an equal number in any column


def embeddings(size: int = B) -> Embeddings:
    rng = np.random.default_rng(0)
    mask = np.arange(R) < rng.integers(1, R + 1, (size, 1))
    shapes = [(size, D), (size, R, D), (size, D), (size, K, D)]
    slide, regions, captions, subcaptions = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return Embeddings(*map(jnp.asarray, (slide, regions, mask, captions, subcaptions)))


def pool(texts, regions, mask):
    """Substitute for the model's attention: softmax over regions of the plain dot product."""
    scores = jnp.where(mask[:, None], jnp.einsum("bcd,brd->bcr", texts, regions), -1e9)
    weights = jax.nn.softmax(scores)
    return jnp.einsum("bcr,brd->bcd", weights, regions), weights


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def apart(related, i: int, j: int) -> bool:
    one, other = ({*np.atleast_1d(related[x]).tolist()} for x in (i, j))
    return not one & other


def slow_slide_loss(slides, captions, related, temperature, smoothing) -> float:
    n, total = len(slides), 0.0
    for rows, columns in ((slides, captions), (captions, slides)):
        for i in range(n):
            counted = [j for j in range(n) if j == i or apart(related, i, j)]
            logits = {j: cosine(rows[i], columns[j]) / temperature for j in counted}
            norm = np.log(sum(np.exp(z) for z in logits.values()))
            total -= (1 - smoothing) * (logits[i] - norm) / n
            total -= smoothing * sum(z - norm for z in logits.values()) / len(counted) / n
    return total / 2


def slow_region_loss(batch, negatives, related, scale, bias, config: LossConfig) -> float:
    def term(i: int, text: np.ndarray, label: int) -> float:
        regions = np.asarray(batch.regions[i])[np.asarray(batch.region_mask[i])].astype(np.float64)
        weights = np.exp(regions @ text)
        z = scale * cosine(weights / weights.sum() @ regions, text) + bias
        return float(np.log1p(np.exp(-label * z)))

    n, texts = len(batch.slide), np.asarray(batch.subcaptions, np.float64)
    shown = min(config.negatives_per_slide or n - 1, n - 1)
    total = 0.0
    for i in range(n):
        own = [term(i, texts[i, k], +1) for k in range(K)]
        others = [(i + step) % n for step in range(1, shown + 1)]
        others = [j for j in others if apart(related, i, j) and not reads_alike(batch, i, j, negatives[i, j])]
        other = [term(i, texts[j, negatives[i, j]], -1) for j in others]
        if config.normaliser == "released":
            total += (sum(own) + sum(other)) / (K + shown)
        else:
            mean = sum(other) / len(other) if other else 0.0
            total += (sum(own) / K + config.negative_weight * mean) / 2 / n
    return total


def reads_alike(batch, i: int, j: int, drawn: int) -> bool:
    """Whether the subcaption drawn from slide j is also a subcaption of slide i."""
    return batch.wording is not None and int(batch.wording[j, drawn]) in np.asarray(batch.wording[i]).tolist()


@pytest.mark.parametrize("case", [APART, CASE, SHARED, jnp.zeros(B, int)])
@pytest.mark.parametrize(("temperature", "smoothing"), [(0.1, 0.1), (0.5, 0.0)])
def test_slide_loss_is_the_slow_one(case, temperature, smoothing):
    batch = embeddings()
    ours = slide_loss(batch.slide, batch.captions, case, temperature=temperature, label_smoothing=smoothing)
    arrays = (np.asarray(x, np.float64) for x in (batch.slide, batch.captions))
    expected = slow_slide_loss(*arrays, np.asarray(case), temperature, smoothing)
    assert float(ours) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_slide_loss_is_the_cross_entropy_of_pytorch():
    torch = pytest.importorskip("torch")
    batch = embeddings()

    def theirs(slides, captions):
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (slides, captions))
        logits, target = a @ b.T / 0.1, torch.arange(B)
        entropy = torch.nn.functional.cross_entropy
        return sum(entropy(x, target, label_smoothing=0.1) for x in (logits, logits.T)) / 2

    inputs = [torch.from_numpy(np.array(x)).requires_grad_() for x in (batch.slide, batch.captions)]
    expected = theirs(*inputs)
    expected.backward()
    ours, gradients = jax.value_and_grad(slide_loss, argnums=(0, 1))(batch.slide, batch.captions, APART)
    assert float(ours) == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(a, b.grad, atol=1e-6)


@pytest.mark.parametrize("case", [APART, CASE])
def test_soft_targets_share_the_target_among_like_captions(case):
    """By a slow loop; and captions that are nearly the same pull a slide as much as its own."""
    batch = embeddings()
    texts, expected = np.asarray(batch.captions, np.float64), 0.0
    for rows, columns in ((batch.slide, batch.captions), (batch.captions, batch.slide)):
        for i in range(B):
            counted = [j for j in range(B) if j == i or apart(case, i, j)]
            logits = {j: cosine(np.asarray(rows)[i], np.asarray(columns)[j]) / 0.1 for j in counted}
            norm = np.log(sum(np.exp(z) for z in logits.values()))
            alike = {j: np.exp(cosine(texts[i], texts[j]) / 0.1) for j in counted}
            for j in counted:
                target = 0.75 * (i == j) + 0.25 * alike[j] / sum(alike.values())
                expected -= (0.9 * target + 0.1 / len(counted)) * (logits[j] - norm) / B / 2
    found = slide_loss(batch.slide, batch.captions, case, soft_targets=0.25)
    assert float(found) == pytest.approx(expected, rel=1e-5)

    def loss(captions):
        return slide_loss(batch.slide, captions, case, label_smoothing=0.0, soft_targets=0.99)

    moved = jax.grad(loss)(batch.captions)
    assert np.isfinite(moved).all() and np.abs(moved).max() > 0


def test_regions_pooled_by_cosine_are_the_best_one_where_it_is_cold():
    batch = embeddings()
    pooled, weights = CosinePooling(1e-3)(batch.subcaptions, batch.regions, batch.region_mask)
    cosines = np.einsum("bcd,brd->bcr", normalise(batch.subcaptions), normalise(batch.regions))
    best = np.where(np.asarray(batch.region_mask)[:, None], cosines, -2).argmax(-1)
    np.testing.assert_array_equal(np.asarray(weights).argmax(-1), best)
    assert (
        np.asarray(weights)[~np.broadcast_to(np.asarray(batch.region_mask)[:, None], weights.shape)].max(initial=0) == 0
    )
    chosen = np.take_along_axis(np.asarray(normalise(batch.regions)), best[..., None], axis=1)
    np.testing.assert_allclose(pooled, chosen, atol=1e-2)
    even, _ = CosinePooling(1e6)(batch.subcaptions, batch.regions, batch.region_mask)
    mask = np.asarray(batch.region_mask)[..., None]
    mean = (np.asarray(normalise(batch.regions)) * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(even, np.broadcast_to(mean[:, None], even.shape), atol=1e-5)


@pytest.mark.parametrize("case", [APART, CASE, jnp.zeros(B, int)])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(normaliser="per_slide", negative_weight=0.3),
        LossConfig(normaliser="per_slide", negatives_per_slide=2),
        LossConfig(negatives_per_slide=1),
        LossConfig(negatives_per_slide=99),
        LossConfig(negatives_at_once=1),
        LossConfig(negatives_at_once=3),  # a last chunk of one
        LossConfig(normaliser="per_slide", negatives_per_slide=3, negatives_at_once=2),
    ],
)
@pytest.mark.parametrize(("scale", "bias"), [(2.66, None), (10.0, -10.0)])
def test_region_loss_is_the_slow_one(case, config, scale, bias):
    batch, negatives = embeddings(), draw_negatives(jax.random.key(1), B, K)
    offset = None if bias is None else jnp.asarray(bias)
    ours, _ = region_loss(batch, pool, negatives, case, jnp.asarray(scale), offset, config)
    expected = slow_region_loss(batch, np.asarray(negatives), np.asarray(case), scale, bias or 0.0, config)
    assert float(ours) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(normaliser="per_slide", negatives_at_once=3)])
def test_shared_captions_and_subcaptions_are_no_negatives(config):
    wording = jnp.array([[7, 8], [1, 2], [3, 4], [8, 5], [6, 6]])  # slides 0 and 3 have a subcaption in common
    negatives = jnp.array([[-1, 0, 1, 0, 1], [0, -1, 0, 1, 0], [1, 0, -1, 0, 0], [1, 0, 1, -1, 0], [0, 1, 1, 0, -1]])
    one, other = int(negatives[0, 3]), int(negatives[3, 0])
    assert wording[3, one] == wording[0, 1] and wording[0, other] == wording[3, 0]
    batch = embeddings()._replace(wording=wording)
    ours, _ = region_loss(batch, pool, negatives, SHARED, jnp.asarray(2.66), None, config)
    expected = slow_region_loss(batch, np.asarray(negatives), np.asarray(SHARED), 2.66, 0.0, config)
    assert float(ours) == pytest.approx(expected, rel=2e-5)
    without, _ = region_loss(batch._replace(wording=None), pool, negatives, SHARED, jnp.asarray(2.66), None, config)
    assert abs(float(without - ours)) > 1e-3


def test_chunks_of_negatives_bound_memory_and_change_no_gradient():
    size, chunk = 256, 16
    batch, negatives = embeddings(size), draw_negatives(jax.random.key(1), size, K)

    def compiled(config):
        def loss(regions, subcaptions):
            one = batch._replace(regions=regions, subcaptions=subcaptions)
            return region_loss(one, pool, negatives, jnp.arange(size), jnp.asarray(2.0), None, config)[0]

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(batch.regions, batch.subcaptions).compile()

    all_at_once, in_chunks = (compiled(LossConfig(negatives_at_once=n)) for n in (None, chunk))
    for a, b in zip(*(f(batch.regions, batch.subcaptions) for f in (all_at_once, in_chunks)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    whole, part = (f.memory_analysis().temp_size_in_bytes for f in (all_at_once, in_chunks))
    bytes_of = [pair_bytes(LossConfig(negatives_at_once=n), size, size, 1, R, D) for n in (None, chunk)]
    assert bytes_of == [4 * size * (size - 1) * D, 4 * size * chunk * D]
    assert whole > bytes_of[0] and part < whole / 4


@pytest.mark.parametrize(("size", "expected"), [(8, 5.545), (64, 44.36)])
def test_the_released_normaliser_grows_with_the_batch_and_per_slide_does_not(size, expected):
    """With z = 0 every text costs ln 2: B (K + B - 1) ln 2 / (K + B - 1) = B ln 2."""
    batch, zero = embeddings(size), jnp.zeros(())
    negatives, case = draw_negatives(jax.random.key(0), size, K), jnp.arange(size)
    released, _ = region_loss(batch, pool, negatives, case, zero, None, LossConfig())
    per_slide, _ = region_loss(batch, pool, negatives, case, zero, None, LossConfig(normaliser="per_slide"))
    assert float(released) == pytest.approx(expected, rel=1e-3)
    assert float(per_slide) == pytest.approx(np.log(2), rel=1e-6)


@pytest.mark.parametrize("normaliser", ["released", "per_slide"])
def test_slides_of_one_case_are_no_negatives(normaliser):
    """Slides 0 and 2 are of one case: the gradient of slide 0 does not depend on the texts of slide 2."""
    batch = embeddings()
    negatives = draw_negatives(jax.random.key(2), B, K)
    config = LossConfig(normaliser=normaliser, slide_weight=0.0)
    moved = batch._replace(
        captions=batch.captions.at[2].set(batch.captions[3]), subcaptions=batch.subcaptions.at[2].multiply(-1.0)
    )

    @jax.jit
    def of_regions(texts, case):
        """The gradient of slide 0's regions."""

        def loss(regions):
            one = texts._replace(regions=regions)
            return alignment_loss(one, pool, negatives, case, jnp.asarray(2.0), None, config)[0]

        return jax.grad(loss)(batch.regions)[0]

    np.testing.assert_array_equal(of_regions(batch, CASE), of_regions(moved, CASE))
    assert np.abs(of_regions(batch, APART) - of_regions(moved, APART)).max() > 1e-3

    # Slide 0 is compared with captions in rows and columns: neither similarity of an excluded pair may count.
    of_slide = jax.jit(jax.grad(slide_loss))
    for case, same in ((CASE, True), (APART, False)):
        before, after = (of_slide(batch.slide, captions, case)[0] for captions in (batch.captions, moved.captions))
        assert (np.abs(before - after).max() < 1e-7) == same


def test_losses_weigh_and_switch_off():
    batch, negatives = embeddings(), draw_negatives(jax.random.key(3), B, K)

    def total(**settings):
        return alignment_loss(batch, pool, negatives, CASE, jnp.asarray(2.0), None, LossConfig(**settings))

    both, metrics = total(slide_weight=0.5, region_weight=2.0)
    assert float(both) == pytest.approx(float(0.5 * metrics["loss_slide"] + 2 * metrics["loss_region"]))
    assert metrics["loss"] == both
    slide_only, metrics = total(region_weight=0.0)
    assert "loss_region" not in metrics and slide_only == metrics["loss_slide"]
    region_only, metrics = total(slide_weight=0.0)
    assert "loss_slide" not in metrics and region_only == metrics["loss_region"]


@pytest.mark.parametrize("normaliser", ["released", "per_slide"])
def test_a_batch_of_one_has_no_negatives(normaliser):
    batch = embeddings(1)
    negatives = draw_negatives(jax.random.key(0), 1, K)

    def f(batch):
        config = LossConfig(normaliser=normaliser)
        return alignment_loss(batch, pool, negatives, jnp.zeros(1, int), jnp.asarray(2.0), None, config)

    (loss, metrics), gradients = jax.value_and_grad(f, has_aux=True, allow_int=True)(batch)
    assert np.isfinite(loss) and metrics["loss_slide"] == pytest.approx(0, abs=1e-6)
    assert all(np.isfinite(x).all() for x in (gradients.slide, gradients.regions, gradients.subcaptions))


def test_negatives_are_a_function_of_the_key():
    drawn = draw_negatives(jax.random.key(0), 40, 3)
    np.testing.assert_array_equal(drawn, jax.jit(draw_negatives, static_argnums=(1, 2))(jax.random.key(0), 40, 3))
    assert (drawn != draw_negatives(jax.random.key(1), 40, 3)).any()
    assert drawn.dtype == jnp.int32 and (jnp.diagonal(drawn) == -1).all()
    counts = np.bincount(np.asarray(drawn)[~np.eye(40, dtype=bool)], minlength=3)
    assert len(counts) == 3 and np.abs(counts / (40 * 39) - 1 / 3).max() < 0.05


def test_normalise_survives_a_zero_vector():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalise(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda y: normalise(y).sum())(x)).all()


def test_an_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match=r"per_batch.*released.*per_slide"):
        LossConfig(normaliser="per_batch")
    with pytest.raises(ValueError, match="negatives_per_slide=0"):
        LossConfig(negatives_per_slide=0)
    with pytest.raises(ValueError, match="negatives_at_once=-1"):
        LossConfig(negatives_at_once=-1)


def test_sentences_of_a_slide_are_hard_negatives_of_each_others_regions():
    """Sentence k pools the regions; they must not match sentence j, unless both are worded alike."""
    wording = jnp.array([[0, 1], [2, 2], [3, 4], [5, 6], [7, 8]])  # slide 1 repeats its sentence
    batch = embeddings()._replace(wording=wording)
    drawn = draw_negatives(jax.random.key(0), B, K)
    plain = LossConfig(normaliser="per_slide")
    total = 0.0
    for b in range(B):
        pooled, _ = pool(batch.subcaptions[b : b + 1], batch.regions[b : b + 1], batch.region_mask[b : b + 1])
        pairs = [(k, j) for k in range(K) for j in range(K) if wording[b, k] != wording[b, j]]
        terms = [np.log1p(np.exp(7 * cosine(pooled[0, k], batch.subcaptions[b, j]) - 2)) for k, j in pairs]
        total += np.mean(terms) / B if terms else 0.0
    without, with_hard = (
        region_loss(batch, pool, drawn, APART, 7.0, -2.0, LossConfig(normaliser="per_slide", within_slide_weight=w))[0]
        for w in (0.0, 0.3)
    )
    assert float(without) == float(region_loss(batch, pool, drawn, APART, 7.0, -2.0, plain)[0])
    assert float(with_hard - without) == pytest.approx(0.3 * total / 2, rel=1e-4)
    unworded = embeddings()  # without wordings, every other sentence counts
    config = LossConfig(normaliser="per_slide", within_slide_weight=0.3)
    assert float(region_loss(unworded, pool, drawn, APART, 7.0, -2.0, config)[0]) > 0
