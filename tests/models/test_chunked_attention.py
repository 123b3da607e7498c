"""Attention by chunks is the plain one: values, gradients, masks, shared key heads, types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.models import chunked_attention, layers

B, S, T, K, A = 2, 11, 9, 4, 6


def inputs(kv_heads: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, S, K, A), (B, T, kv_heads, A), (B, T, kv_heads, A))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def masks() -> dict[str, jax.Array | None]:
    rng = np.random.default_rng(0)
    per_query = rng.random((B, 1, S, T)) < 0.6
    per_query[0, 0, 3] = False  # a query that may look nowhere
    return {
        "none": None,
        "keys": jnp.arange(T)[None, None, None] < jnp.array([T, 5])[:, None, None, None],
        "queries": jnp.asarray(per_query),
        "one for all": jnp.asarray(per_query[1:]),
    }


@pytest.fixture(params=[4, 8, 256])
def chunk(request, monkeypatch):
    """Chunks that divide the queries, that do not, and one for all."""
    monkeypatch.setattr(chunked_attention, "CHUNK", request.param)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", masks())
def test_chunked_attention_is_the_plain_one(chunk, kv_heads, name):
    q, k, v = inputs(kv_heads)
    mask = masks()[name]
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def loss(q, k, v, implementation):
        output = layers.attention(q, k, v, mask, implementation=implementation)
        return jnp.sum(output * weight), output

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    (_, expected), expected_gradients = step(q, k, v, "xla")
    (_, found), gradients = step(q, k, v, "chunked")
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunked_attention_keeps_the_type_and_sums_in_float32(chunk):
    q, k, v = inputs(2, jnp.bfloat16)
    found = layers.attention(q, k, v, implementation="chunked")
    assert found.dtype == jnp.bfloat16
    exact = layers.attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2e-2)


def test_a_mask_per_head_is_refused():
    with pytest.raises(ValueError, match="one mask for all heads"):
        layers.attention(*inputs(2), jnp.ones((B, K, S, T), bool), implementation="chunked")
