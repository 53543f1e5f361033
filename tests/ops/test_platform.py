"""Platform switch: CPU implementations are used in programs for a CPU only, and both compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pathflip_jax.model.layers import LayerNorm
from pathflip_jax.ops import matmul, patch_pooling
from pathflip_jax.ops.attention import pool
from pathflip_jax.ops.platform import by_platform, fusion_barrier, target_platform, unchanged


@pytest.fixture
def elsewhere(monkeypatch):
    """Trace as for a TPU, with trace caches cleared before and after."""
    from pathflip_jax.ops import platform

    jax.clear_caches()
    monkeypatch.setattr(platform, "target_platform", lambda: "tpu")
    yield
    jax.clear_caches()


def gradient_of_a_layer():
    """Lowered program of a layer that contains every switched operation."""
    norm = LayerNorm(8, 1e-5)

    def loss(x, kernel):
        x = norm(matmul.contract("abi,io->abo", x, kernel))
        return sum(part.sum() for part in pool(x, x, x, None))

    return jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((2, 3, 8)), jnp.ones((8, 8))).as_text()


def test_the_platform_is_that_of_the_mesh_or_else_of_the_backend(monkeypatch):
    assert target_platform() == jax.default_backend()
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    assert target_platform() == "abacus"
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert target_platform() == jax.devices()[0].platform


def test_only_a_cpu_has_fusion_barriers_and_sums_as_products():
    program = gradient_of_a_layer()
    assert program.count("optimization_barrier") > 2 and "contracting_dims = [0] x [0]" in program
    assert "8x1xf32" in program  # the vector of ones for row sums


def test_elsewhere_weights_of_attention_are_deferred_and_nothing_else(elsewhere):
    program = gradient_of_a_layer()
    assert "contracting_dims = [0, 1] x [0, 1]" in program and "8x1xf32" not in program
    assert program.count("optimization_barrier") == 1  # recomputation waits for the incoming gradient


def test_a_switch_gives_each_platform_its_form(elsewhere):
    double, triple = (lambda x: 2 * x), (lambda x: 3 * x)
    chosen = by_platform(cpu=double, default=triple)
    assert chosen(1) == 3 and chosen.cpu is double and chosen.default is triple
    x = jnp.ones(3)
    assert fusion_barrier(x) is x and unchanged((x, x)) == (x, x)


@pytest.mark.parametrize(
    ("cpu", "default", "shape"),
    [
        (matmul.row_products, matmul.plain_row_sums, (2, 5, 70)),
        (matmul.column_products, matmul.plain_column_sums, (2, 5, 70)),
        (patch_pooling.region_products, patch_pooling.plain_sum_regions, (2, 5, 7, 11)),
        (lax.optimization_barrier, unchanged, (4, 3)),
    ],
)
def test_both_forms_have_the_same_values_and_gradients(cpu, default, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    for one, other in (
        (cpu(x), default(x)),
        *[(jax.grad(lambda x, form=form: (form(x) ** 2).sum())(x) for form in (cpu, default))],
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "output", "right", "shapes"),
    [
        ("abi", "abo", "io", [(2, 3, 4), (2, 3, 5)]),
        ("bghqD", "bgqhd", "Dhd", [(2, 3, 2, 4, 6), (2, 3, 4, 2, 5)]),
        ("ni", "no", "io", [(3, 4), (3, 5)]),
    ],
)
def test_gradients_of_kernels_are_the_same_over_joined_axes(left, output, right, shapes):
    x, gradient = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    joined, plain = (f(left, output, right, x, gradient) for f in (matmul.contract_joined_rows, matmul.contract_rows))
    np.testing.assert_allclose(joined, plain, rtol=1e-5, atol=1e-5)
