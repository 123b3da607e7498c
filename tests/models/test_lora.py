"""Adapters: they start as nothing, equal merged weights, alone get a gradient, and never make a merged stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from npedit_jax.models import lora
from npedit_jax.models.denoiser import Denoiser

PATTERNS = ("layers/attention/*", "layers/mlp/*", "final/projection")
RANK, ALPHA = 2, 6.0
DEPTH, WIDTH = 3, 16


@functools.cache
def network():
    module = Denoiser(
        channels=2,
        width=WIDTH,
        depth=DEPTH,
        refiner_depth=1,
        heads=2,
        text_width=6,
        rope_widths=(4, 2, 2),
        rope_lengths=(64, 8, 8),
        pad_multiple=4,
        remat="full",
    )
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    inputs = (noise(2, 4, 4, 2), jnp.array([0.3, 0.9]), noise(2, 5, 6), jnp.ones((2, 5), bool), noise(2, 4, 4, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda x: 0.3 * noise(*x.shape), shapes)
    return module, params, inputs


@functools.cache
def adapters():
    """Fresh ones, and ones whose `b` is not zero any more."""
    fresh = lora.create(jax.random.key(1), network()[1], rank=RANK, patterns=PATTERNS)
    trained = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    return fresh, trained


@functools.cache
def program():
    module, _, inputs = network()
    return jax.jit(lambda variables: module.apply(variables, *inputs))


def test_fresh_adapters_change_nothing():
    _, params, _ = network()
    fresh, _ = adapters()
    with_adapters = program()(lora.variables(params, fresh, ALPHA))
    np.testing.assert_array_equal(with_adapters, program()({"params": params}))
    np.testing.assert_array_equal(
        lora.merge(params, fresh, ALPHA)["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"]
    )


def test_shapes_follow_the_stack_and_patterns():
    fresh, _ = adapters()
    assert fresh.keys() == {"layers", "final"}
    assert fresh["layers"]["attention"].keys() == {"query", "key", "value", "out"}
    assert fresh["layers"]["mlp"]["down"]["a"].shape == (DEPTH, int(WIDTH / 3 * 8), RANK)
    assert fresh["layers"]["mlp"]["down"]["b"].shape == (DEPTH, RANK, WIDTH)
    assert fresh["final"]["projection"]["a"].shape == (WIDTH, RANK)
    a = fresh["layers"]["attention"]["query"]["a"]
    assert 0.5 * WIDTH**-0.5 < float(jnp.abs(a).max()) <= WIDTH**-0.5
    assert not np.allclose(a[0], a[1]) and not np.allclose(a, fresh["layers"]["attention"]["key"]["a"])


def test_network_with_adapters_is_the_merged_network():
    _, params, _ = network()
    _, trained = adapters()
    found = program()(lora.variables(params, trained, ALPHA))
    merged = program()({"params": lora.merge(params, trained, ALPHA)})
    assert jnp.linalg.norm(found - merged) <= 2e-5 * jnp.linalg.norm(merged)
    assert jnp.linalg.norm(found - program()({"params": params})) > 1e-2 * jnp.linalg.norm(merged)


def test_gradients_are_those_through_merged_weights_and_the_base_gets_none():
    module, params, inputs = network()
    _, trained = adapters()

    def loss(make, base, pairs):
        return jnp.sum(jnp.square(module.apply(make(base, pairs, ALPHA), *inputs)))

    def merged(base, pairs, alpha):
        return {"params": lora.merge(base, pairs, alpha)}

    expected = jax.jit(jax.grad(functools.partial(loss, merged), argnums=1))(params, trained)
    base, found = jax.jit(jax.grad(functools.partial(loss, lora.variables), argnums=(0, 1)))(params, trained)
    assert all(float(jnp.abs(g).max()) == 0.0 for g in jax.tree.leaves(base))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-4 * jnp.linalg.norm(b)
        assert jnp.linalg.norm(b) > 0


def made(jaxpr) -> list[tuple[str, tuple[int, ...]]]:
    """Primitive and shape of every value that a program computes, inner programs included; its inputs left out."""
    found = []
    for equation in jaxpr.eqns:
        found += [(equation.primitive.name, tuple(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += made(inner)
    return found


def test_no_stack_of_kernels_is_ever_computed():
    """Neither merged weights nor their gradient, forward and backward: the frozen stack is only read."""
    module, params, inputs = network()
    fresh, _ = adapters()
    stack = params["layers"]["mlp"]["up"]["kernel"].shape

    def loss(pairs, base):
        return jnp.sum(module.apply(lora.variables(base, pairs, ALPHA), *inputs))

    def whole(base):
        return jnp.sum(module.apply({"params": base}, *inputs))

    def stacks(gradient, *arguments):
        return {name for name, shape in made(jax.make_jaxpr(gradient)(*arguments).jaxpr) if shape == stack}

    assert stacks(jax.grad(loss), fresh, params) <= {"stop_gradient"}, "which is no computation"
    assert "scan" in stacks(jax.grad(whole), params)


def test_types_of_base_and_adapters_are_kept_apart():
    module, params, inputs = network()
    module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    _, trained = adapters()
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss(pairs):
        return jnp.sum(module.apply(lora.variables(stored, pairs, ALPHA), *inputs))

    gradients = jax.eval_shape(jax.grad(loss), trained)
    assert {str(g.dtype) for g in jax.tree.leaves(gradients)} == {"float32"}
    assert lora.merge(stored, trained, ALPHA)["final"]["projection"]["kernel"].dtype == jnp.bfloat16


def test_wrong_adapters_are_refused():
    _, params, _ = network()
    with pytest.raises(ValueError, match=r"\['layers/mlp/sideways'\] choose no linear layer"):
        lora.create(jax.random.key(0), params, rank=1, patterns=("layers/mlp/up", "layers/mlp/sideways"))
    with pytest.raises(ValueError, match="rank of at least 1"):
        lora.create(jax.random.key(0), params, rank=0, patterns=PATTERNS)
    with pytest.raises(ValueError, match="'elsewhere' do not belong"):
        lora.merge(params, {"elsewhere": adapters()[0]["final"]["projection"]}, ALPHA)
