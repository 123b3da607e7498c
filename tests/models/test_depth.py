"""Programs do not grow with depth: what makes 30 layers compile about as fast as 3 (benchmarks/compile_time.py)."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from npedit_jax.models.denoiser import Denoiser
from npedit_jax.models.language import Decoder, TextEncoder


def equations(jaxpr) -> int:
    """Equations of a program, those of its inner programs (scan bodies, rematerialised blocks) included."""
    inner = [sub for equation in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(equation.params)]
    return len(jaxpr.eqns) + sum(equations(sub) for sub in inner)


def denoiser_program(depth: int, remat: str) -> int:
    module = Denoiser(
        channels=4, width=32, depth=depth, refiner_depth=1, heads=2, text_width=8, rope_widths=(4, 6, 6), remat=remat
    )
    latents = jnp.zeros((1, 4, 4, 4))
    inputs = (latents, jnp.zeros(1), jnp.zeros((1, 5, 8)), jnp.ones((1, 5), bool), latents)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    gradients = jax.grad(lambda params: module.apply({"params": params}, *inputs).sum())
    return equations(jax.make_jaxpr(gradients)(params).jaxpr)


def encoder_program(depth: int) -> int:
    module = TextEncoder(
        Decoder(vocabulary=8, width=16, layers=depth, heads=2, kv_heads=1, head_width=8, mlp_width=16, final_norm=False)
    )
    inputs = (jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return equations(jax.make_jaxpr(lambda params: module.apply({"params": params}, *inputs))(params).jaxpr)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_denoiser_of_30_layers_is_as_long_a_program_as_of_3(remat):
    assert denoiser_program(30, remat) == denoiser_program(3, remat) > 100


def test_text_encoder_of_30_layers_is_as_long_a_program_as_of_3():
    assert encoder_program(30) == encoder_program(3) > 50
