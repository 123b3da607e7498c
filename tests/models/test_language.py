"""The decoders against golden runs, against transformers' classes with every gradient, and their own properties."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from npedit_jax import weights
from npedit_jax.models.language import Decoder, TextEncoder, causal_mask, token_positions
from npedit_jax.weights import qwen3
from npedit_jax.weights.language import build_decoder, decoder_rows, describe_decoder
from tests.models.torch_parity import FORWARD, assert_gradients, count, fill, randomise, relative, to_flax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "C"
SMALL = {"vocabulary": 31, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24}
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def run(module: Decoder, params, token_ids, mask, hidden: bool = False):
    """Hidden states, or logits, at every position."""

    def forward(decoder: Decoder):
        mask_BL = jnp.asarray(mask, bool)
        out = decoder(decoder.embed(jnp.asarray(token_ids)), token_positions(mask_BL), causal_mask(mask_BL))
        return out if hidden else decoder.unembed(out)

    return jax.jit(lambda p: module.apply({"params": p}, method=forward))(params)


def initialise(module: Decoder, rng=None):
    def forward(decoder: Decoder):
        ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
        return decoder.unembed(decoder(decoder.embed(ids), token_positions(mask), causal_mask(mask)))

    return module.init(jax.random.key(0) if rng is None else rng, method=forward)["params"]


def random_params(module: Decoder):
    return fill(jax.eval_shape(lambda: initialise(module)))


def test_text_encoder_is_the_original():
    golden = safetensors.numpy.load_file(GOLDEN / "golden.safetensors")
    module, params = weights.load("qwen3", GOLDEN / "text_encoder")
    hidden = jax.jit(lambda *x: module.apply({"params": params}, *x))(golden["input_ids"], golden["attention_mask"])
    assert relative(hidden, golden["emb"]) <= FORWARD  # rows on padding included


def test_unused_rows_complete_the_language_model():
    golden = safetensors.numpy.load_file(GOLDEN / "golden.safetensors")
    encoder, params = weights.load("qwen3", GOLDEN / "text_encoder", keep_unused=True)
    whole = encoder.decoder.clone(layers=encoder.decoder.layers + 1, final_norm=True)
    stacked = jax.tree.map(
        lambda x, last: jnp.concatenate([x, last[None]]), params["decoder"]["layers"], params["unused"]["last_layer"]
    )
    params = params["decoder"] | {"layers": stacked, "norm": params["unused"]["norm"]}
    hidden = run(whole, params, golden["input_ids"], golden["attention_mask"], hidden=True)
    assert relative(hidden, golden["last_hidden"]) <= FORWARD


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2},
        {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ],
)
def test_every_gradient_is_that_of_transformers(config):
    config = {
        "vocab_size": 37,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | config
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)))
    ours = build_decoder(config)
    table = decoder_rows(ours, "model.")
    rng = np.random.default_rng(1)
    token_ids = rng.integers(0, 37, (3, 11))
    mask = np.arange(11) < np.array([[11], [7], [4]])
    probe = rng.normal(size=(3, 11, 37)).astype(np.float32) * mask[:, :, None]

    logits = theirs(torch.tensor(token_ids), attention_mask=torch.tensor(mask.astype(int))).logits
    (logits * torch.tensor(probe)).sum().backward()
    params = to_flax(table, {name: x.detach().numpy() for name, x in theirs.named_parameters()})
    expected = to_flax(table, {name: x.grad.numpy() for name, x in theirs.named_parameters()})

    def loss(p):
        found = run(ours, p, token_ids, mask)
        return jnp.sum(found * probe), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert relative(found[mask], logits.detach().numpy()[mask]) <= FORWARD
    assert_gradients(gradients, expected)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_left_padding_and_the_gradient_of_the_embeddings_are_those_of_transformers(model_type):
    config = dict(model_type=model_type, vocab_size=37, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)))
    ours = build_decoder(config)
    params = to_flax(decoder_rows(ours, "model."), {name: x.detach().numpy() for name, x in theirs.named_parameters()})
    mask = np.arange(9) >= np.array([[0], [4]])
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(2, 9, 32)).astype(np.float32)
    probe = rng.normal(size=(2, 9, 37)).astype(np.float32) * mask[:, :, None]
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)

    given = torch.tensor(embeddings, requires_grad=True)
    told = dict(attention_mask=torch.tensor(mask.astype(int)), position_ids=torch.tensor(positions))
    logits = theirs(inputs_embeds=given, **told).logits
    (logits * torch.tensor(probe)).sum().backward()

    def loss(x):
        read = lambda decoder, x: decoder.unembed(decoder(x, token_positions(mask), causal_mask(mask)))  # noqa: E731
        found = ours.apply({"params": params}, x, method=read)
        return jnp.sum(found * probe), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(embeddings)
    assert relative(found[mask], logits.detach().numpy()[mask]) <= FORWARD
    assert relative(np.asarray(gradient)[mask], given.grad.numpy()[mask]) <= 1e-4
    assert not np.asarray(gradient)[~mask].any()


def test_padding_on_the_left_and_on_the_right_give_the_same():
    module = TextEncoder(Decoder(**SMALL, qk_norm=True, tied_embeddings=True, final_norm=False))
    token_ids = np.random.default_rng(0).integers(0, 31, 6)
    places = [(0, 4), (4, 0), (3, 1)]
    padded = np.stack([np.pad(token_ids, place, constant_values=9) for place in places])
    mask = np.stack([np.pad(np.ones(6), place) for place in places])
    params = fill(jax.eval_shape(module.init, jax.random.key(1), padded, mask))
    hidden = jax.jit(module.apply)(params, padded, mask)
    assert jnp.isfinite(hidden).all()
    bare = jax.jit(module.apply)(params, token_ids[None], np.ones((1, 6)))
    for row, (before, _) in zip(hidden, places, strict=True):
        np.testing.assert_allclose(row[before : before + 6], bare[0], atol=2e-5)


def test_a_token_depends_on_itself_and_earlier_ones_only():
    module = Decoder(**SMALL, qkv_bias=True)
    params = random_params(module)
    mask, position = jnp.ones((1, 7), bool), 3
    embeddings = jax.random.normal(jax.random.key(2), (1, 7, 16))

    def read(x):
        return jnp.sum(module.apply({"params": params}, x, token_positions(mask), causal_mask(mask))[0, position])

    reached = jnp.any(jax.jit(jax.grad(read))(embeddings)[0] != 0, axis=-1)
    np.testing.assert_array_equal(reached, np.arange(7) <= position)


def test_segments_see_themselves_and_the_shared_beginning():
    mask = causal_mask(jnp.array([[1, 1, 1, 1, 1, 0]], bool), jnp.array([[0, 1, 1, 2, 2, -1]]))[0]
    expected = [[1], [1, 1], [1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1, 1]]
    for row, seen in zip(mask, expected, strict=False):
        np.testing.assert_array_equal(row, np.pad(seen, (0, 6 - len(seen))))


def test_rematerialisation_changes_no_gradient():
    module = Decoder(**SMALL, qk_norm=True, tied_embeddings=True)
    params, token_ids, mask = random_params(module), np.arange(10).reshape(2, 5), np.ones((2, 5))

    def gradient(policy):
        decoder = module.clone(remat=policy)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(run(decoder, p, token_ids, mask)))))(params)

    assert_gradients(gradient("full"), jax.tree.map(np.asarray, gradient("none")))


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_keeps_float32_logits(tied):
    module = Decoder(**SMALL, qk_norm=True, tied_embeddings=tied)
    params, token_ids, mask = random_params(module), np.arange(10).reshape(2, 5), np.ones((2, 5))
    low = module.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda p: run(low, p, token_ids, mask, hidden=True), params).dtype == jnp.bfloat16
    logits = run(low, params, token_ids, mask)
    assert logits.dtype == jnp.float32
    assert relative(logits, run(module, params, token_ids, mask)) < 0.03
    # Rounding the result to bfloat16 would leave 8 bits of each logit.
    assert jnp.any(logits.astype(jnp.bfloat16).astype(jnp.float32) != logits)


def test_fresh_logits_have_unit_scale():
    module = Decoder(vocabulary=100, width=128, layers=4, heads=4, kv_heads=2, head_width=32, mlp_width=256,
                     qkv_bias=True, tied_embeddings=True)  # fmt: skip
    params = jax.jit(lambda rng: initialise(module, rng))(jax.random.key(0))
    logits = run(module, params, np.arange(64).reshape(2, 32), np.ones((2, 32)))
    assert 0.3 < jnp.std(logits) < 3.0


def test_full_size_counts():
    encoder = qwen3.build(QWEN3_4B)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))["params"]
    last_layer = count(shapes["decoder"]["layers"]) // 35
    assert count(shapes) + last_layer + 2560 == 4_022_468_096
    internvl3_14b = Decoder(
        vocabulary=151674, width=5120, layers=48, heads=40, kv_heads=8, head_width=128, mlp_width=13824, qkv_bias=True
    )
    assert count(jax.eval_shape(lambda: initialise(internvl3_14b))) == 14_766_040_064


def test_config_round_trip():
    for qk_norm in (True, False):
        module = Decoder(**SMALL | {"width": 32}, rope_theta=5e5, epsilon=1e-5, qkv_bias=not qk_norm, qk_norm=qk_norm)
        assert build_decoder(describe_decoder(module)) == module
    encoder = qwen3.build(QWEN3_4B, remat="full")
    assert qwen3.build(qwen3.describe(encoder), remat="full") == encoder


def test_rope_theta_is_read_in_both_spellings():
    new = {key: value for key, value in QWEN3_4B.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert build_decoder(new) == build_decoder(QWEN3_4B)
    assert build_decoder(QWEN3_4B).rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(QWEN3_4B | change)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kv_heads=3"):
        initialise(Decoder(**SMALL | {"kv_heads": 3}))
    with pytest.raises(ValueError, match="final_norm"):
        TextEncoder(Decoder(**SMALL)).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        qwen3.build(QWEN3_4B | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="neither Qwen2"):
        describe_decoder(Decoder(**SMALL, qk_norm=True, qkv_bias=True))
