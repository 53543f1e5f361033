"""Probes: learning, isolation from test labels, and agreement with scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from pathflip_jax.evaluate.tasks import probes
from pathflip_jax.evaluate.tasks.probes import Attention, Labelled


def clusters(n, seed=0, classes=3, width=8, spread=0.3):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return Labelled(np.eye(classes, width)[y] + spread * rng.normal(size=(n, width)), y)


@pytest.mark.parametrize("probe", [probes.linear, probes.nearest])
@pytest.mark.parametrize("with_val", [True, False])
def test_probes_of_embeddings_find_clusters(probe, with_val):
    train, val, test = clusters(30), clusters(12, 1), clusters(60, 2)
    belief = probe(train, val if with_val else None, test.x, 3)
    assert belief.shape == (60, 3) and belief.sum(1) == pytest.approx(1)
    assert np.mean(belief.argmax(1) == test.y) > 0.85


def test_a_class_that_no_training_slide_has_is_never_believed_in():
    train = clusters(10, classes=2)
    assert (probes.linear(train, None, clusters(6).x, 3)[:, 2] == 0).all()
    assert (probes.nearest(train, None, clusters(6).x, 3)[:, 2] == 0).all()


def test_neighbours_are_those_of_scikit_learn():
    train, test = clusters(30, spread=1.0), clusters(40, 2, spread=1.0)

    def votes(distance):  # cosine distance
        return np.exp((distance.min(1, keepdims=True) - distance) / probes.VOTE_TEMPERATURE)

    theirs = KNeighborsClassifier(probes.FIXED_NEIGHBOURS, metric="cosine", weights=votes).fit(train.x, train.y)
    assert probes.nearest(train, None, test.x, 3) == pytest.approx(theirs.predict_proba(test.x), abs=1e-5)


def test_the_setting_comes_from_val():
    """Two neighbours of the other class surround every slide of class 0: one neighbour is right, three are wrong."""
    angles = np.array([0.0, 0.04, -0.04, 2.0, 2.5])
    train = Labelled(np.stack([np.cos(angles), np.sin(angles)], 1), np.array([0, 1, 1, 1, 1]))
    here = np.array([[np.cos(0.001), np.sin(0.001)]])
    at_zero = Labelled(np.concatenate([here, train.x[3:4]]), np.array([0, 1]))
    assert probes.nearest(train, at_zero, here, 2).argmax() == 0
    assert probes.nearest(train, Labelled(here, np.array([1])), here, 2).argmax() == 1


def bags(n, seed, classes=2, width=8):
    """One region in each bag says the class, the others are noise; bags have 3 to 9 regions."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = []
    for c in y:
        bag = rng.normal(size=(rng.integers(3, 10), width))
        bag[rng.integers(len(bag))] = 6 * np.eye(width)[c]
        x.append(bag.astype(np.float32))
    return Labelled(x, y)


HOW = {"settings": Attention(hidden=16), "room": (9, 600)}  # one compiled program for all tests
TRAIN, VAL, TEST = bags(40, 0), bags(4, 1), bags(60, 2)


@pytest.mark.parametrize("val", [VAL, None])
def test_attention_finds_the_region_that_counts(val):
    belief = probes.attention_mil(TRAIN, val, TEST.x, 2, seed=0, **HOW)
    assert belief.shape == (60, 2) and belief.sum(1) == pytest.approx(1, abs=1e-5)
    assert np.mean(belief.argmax(1) == TEST.y) > 0.9
    assert (belief == probes.attention_mil(TRAIN, val, TEST.x, 2, seed=0, **HOW)).all()


def test_attention_is_blind_to_padding_and_to_the_other_slides_that_are_tested():
    params = probes._start(np.random.default_rng(0), 8, 16, 2)
    flat = np.concatenate([TEST.x[0], TEST.x[1], np.full((5, 8), 1e3, np.float32)])
    first, second = len(TEST.x[0]), len(TEST.x[1])
    alone = probes._pool(params, TEST.x[0], np.arange(first)[None])
    slots = np.full((2, 14), -1)
    slots[0, :first], slots[1, :second] = np.arange(first), first + np.arange(second)
    assert np.asarray(probes._pool(params, flat, slots)[:1]) == pytest.approx(np.asarray(alone), abs=1e-5)
    fewer = probes.attention_mil(TRAIN, None, TEST.x[:50], 2, seed=0, **HOW)
    assert fewer == pytest.approx(probes.attention_mil(TRAIN, None, TEST.x, 2, seed=0, **HOW)[:50], abs=1e-5)


def test_pooling_is_gated_attention():
    """Written out region by region, as Ilse et al. have it."""
    params = probes._start(np.random.default_rng(1), 8, 16, 2)
    bag = TEST.x[3]
    gated = [np.tanh(h @ params["content"]) / (1 + np.exp(-h @ params["gate"])) @ params["attend"][:, 0] for h in bag]
    weights = np.exp(gated) / np.exp(gated).sum()
    expected = sum(w * h for w, h in zip(weights, bag, strict=True)) @ params["classify"]
    assert np.asarray(probes._pool(params, bag, np.arange(len(bag))[None]))[0] == pytest.approx(expected, abs=1e-4)


def test_the_round_comes_from_val_alone():
    """Of all rounds the one is kept in which the val slides are believed best; what is tested has no part in it."""
    on_val, on_test = probes.attention_rounds(TRAIN, VAL, TEST.x, 2, seed=3, **HOW)
    likely = [np.log(belief[np.arange(4), VAL.y] + 1e-6).sum() for belief in on_val]
    chosen = probes.attention_mil(TRAIN, VAL, TEST.x, 2, seed=3, **HOW)
    assert on_val.shape == (20, 4, 2) and on_test.shape == (20, 60, 2)
    assert (chosen == on_test[int(np.argmax(likely))]).all()
