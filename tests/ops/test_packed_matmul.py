"""Products with kernels as they are stored, against the kernels as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.ops import packed_matmul as ops
from pathflip_jax.ops.packed_matmul import layout_for, packed_matmul, packed_matmul_reference, store


@pytest.mark.parametrize("rows", [1, 3, ops.FEW + 1])
@pytest.mark.parametrize("layout", ["plain", "rows", "pairs"])
def test_products_are_those_of_the_plain_kernel(layout, rows):
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((rows, 40), (40, 24)))
    )
    found = packed_matmul(x, store(kernel, layout), layout)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, packed_matmul_reference(x, kernel), rtol=1e-5, atol=1e-5)


def test_only_a_cpu_stores_kernels_in_another_form(monkeypatch):
    dtypes = [(jnp.dtype(a), jnp.dtype(b)) for a, b in (("float32", "float32"), ("bfloat16", "float32"))]
    monkeypatch.setattr(ops, "traced_for", lambda: "cpu")
    assert [layout_for(*pair) for pair in dtypes] == ["rows", "pairs"]
    monkeypatch.setattr(ops, "traced_for", lambda: "tpu")
    assert [layout_for(*pair) for pair in dtypes] == ["plain", "plain"]
