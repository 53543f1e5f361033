"""The scorer of a viewer: its method is checked before a slide is encoded."""

import pytest

from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.viewer.grounder import Grounder


def test_a_viewer_of_maps_that_were_never_trained_does_not_start(predictor):
    loss = {"loss": {"region_weight": 0.0}}
    run = Predictor(predictor.model, predictor.config | loss, predictor.tokenizer, name="runs/one")
    with pytest.raises(ValueError, match=r"runs/one: method 'patch' .* \(loss.region_weight is 0\); .*: slide$"):
        Grounder(run, "patch")
    assert Grounder(run).method == "slide" and Grounder(predictor, "patch").method == "patch"
