"""Products with packed kernels against products with the original kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops import packed_matmul as ops
from pathflip_jax.ops.packed_matmul import best_layout, packed_matmul, packed_matmul_reference, store


@pytest.mark.parametrize("rows", [1, 3, ops.MAX_ROWS + 1])
@pytest.mark.parametrize("form", ["plain", "rows"])
def test_products_are_those_of_the_plain_kernel(form, rows):
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((rows, 40), (40, 24)))
    )
    found = packed_matmul(x, store(kernel, form), form)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, packed_matmul_reference(x, kernel), rtol=1e-5, atol=1e-5)


def test_only_a_cpu_stores_kernels_in_another_form(monkeypatch):
    monkeypatch.setattr(ops, "target_platform", lambda: "cpu")
    assert best_layout() == "rows"
    monkeypatch.setattr(ops, "target_platform", lambda: "tpu")
    assert best_layout() == "plain"
