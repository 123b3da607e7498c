"""The TPU flash kernel, interpreted, against plain attention: values and gradients, masks, lengths that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax import parallel
from npedit_jax.models import flash_attention, layers
from npedit_jax.models.denoiser import Denoiser


def inputs(length: int, heads: int = 2, kv_heads: int = 2, batch: int = 2):
    rng = np.random.default_rng(0)
    draw = lambda count: jnp.asarray(rng.normal(size=(batch, length, count, 128)), jnp.float32)  # noqa: E731
    return draw(heads), draw(kv_heads), draw(kv_heads)


def mask_of(length: int, visible: tuple[int, ...]) -> jax.Array:
    return (jnp.arange(length)[None] < jnp.asarray(visible)[:, None])[:, None, None]


def with_holes(length: int, batch: int = 2) -> jax.Array:
    """Three keys of four, and the second tile of 128 of the first sample hidden whole."""
    visible = np.random.default_rng(1).random((batch, length)) < 0.75
    visible[0, 128:256] = False
    return jnp.asarray(visible)[:, None, None]


def both(arguments, mask):
    """Outputs and gradients of the flash and of the plain form."""

    def gradients(implementation):
        def loss(arguments):
            x = layers.attention(*arguments, mask, implementation=implementation)
            return jnp.sum(jnp.sin(x)), x

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)

    return gradients("splash"), gradients("xla")


@pytest.mark.parametrize("visible", [None, (200, 77)])
@pytest.mark.parametrize("length", [256, 200])
def test_flash_equals_plain(monkeypatch, length, visible):
    monkeypatch.setattr(layers, "FLASH_LENGTH", 128)
    found, expected = both(inputs(length), None if visible is None else mask_of(length, visible))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_tiles_of_keys_come_together(monkeypatch):
    """Five tiles of 128: the running maximum and sum go over all of them, one of which nobody sees."""
    monkeypatch.setattr(layers, "FLASH_LENGTH", 128)
    assert [640 % size for size in flash_attention.BLOCKS].index(0) == flash_attention.BLOCKS.index(128)
    found, expected = both(inputs(640), with_holes(640))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_key_heads_are_shared(monkeypatch):
    monkeypatch.setattr(layers, "FLASH_LENGTH", 128)
    found, expected = both(inputs(128, heads=4, kv_heads=2, batch=1), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_the_kernel_runs_from_the_threshold_on_and_where_it_fits(monkeypatch):
    """Short sequences, narrow heads and masks that differ between queries take the plain form."""
    calls = []
    monkeypatch.setattr(flash_attention, "attention", lambda q, k, v, visible: calls.append(visible) or q)
    monkeypatch.setattr(layers, "FLASH_LENGTH", 64)
    q, k, v = inputs(64)
    layers.attention(q, k, v, implementation="splash")
    layers.attention(q, k, v, mask_of(64, (64, 3)), implementation="splash")
    assert len(calls) == 2 and calls[0] is None and calls[1].shape == (2, 64)
    layers.attention(q[:, :63], k[:, :63], v[:, :63], implementation="splash")
    layers.attention(q[..., :64], k[..., :64], v[..., :64], implementation="splash")
    layers.attention(q, k, v, jnp.tril(jnp.ones((1, 1, 64, 64), bool)), implementation="splash")
    layers.attention(q, k, v, implementation="xla")
    assert len(calls) == 2


def test_long_plain_attention_goes_in_chunks(monkeypatch):
    q, k, v = inputs(64)
    expected = layers.attention(q, k, v, mask_of(64, (64, 9)))
    monkeypatch.setattr(layers, "LONG", 64)
    found = layers.attention(q, k, v, mask_of(64, (64, 9)))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    assert "while" in jax.jit(layers.attention).lower(q, k, v).as_text()


def test_kernels_of_another_platform_become_the_plain_form():
    for platform, kept in {"tpu": {"splash"}, "gpu": {"cudnn"}, "cpu": set()}.items():
        found = {name: layers.runnable(Denoiser(implementation=name), platform) for name in layers.IMPLEMENTATIONS}
        runnable = {"xla", "chunked"} | kept
        assert {name: x.implementation for name, x in found.items()} == {
            name: name if name in runnable else "xla" for name in layers.IMPLEMENTATIONS
        }


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="unknown attention 'flash'.*splash"):
        layers.attention(*inputs(64), implementation="flash")


@pytest.mark.parametrize("policy", layers.REMAT_POLICIES)
def test_remat_policies_leave_gradients_alone(policy):
    q, k, v = inputs(32, batch=1)
    loss = lambda q: jnp.sum(jnp.sin(layers.attention(jnp.tanh(q), k, v)))  # noqa: E731
    kept = jax.checkpoint(loss, policy=layers.REMAT_POLICIES[policy])
    np.testing.assert_allclose(jax.jit(jax.grad(kept))(q), jax.jit(jax.grad(loss))(q), rtol=1e-5, atol=1e-6)


def test_flash_on_a_mesh_of_one_is_the_same(monkeypatch):
    monkeypatch.setattr(layers, "FLASH_LENGTH", 128)
    arguments = inputs(128, batch=1)
    with jax.set_mesh(parallel.make_mesh()):
        found, expected = both(arguments, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)
