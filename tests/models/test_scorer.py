"""The scorer against golden runs, against transformers' classes with every gradient, and its own properties."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from npedit_jax import weights
from npedit_jax.models import any_resolution, image_preparation
from npedit_jax.models.language import causal_mask, token_positions
from npedit_jax.models.scorer import NewlineProjector, Scorer, ShuffleProjector
from npedit_jax.weights import internvl, kinds, llava_onevision, published
from tests.models.torch_parity import FORWARD, GRADIENT, assert_gradients, count, fill, randomise, relative, to_flax

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PLACEHOLDER, NO, YES = 288, 256, 258
LANGUAGE = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
}
SMALL = {
    "model_type": "internvl_chat",
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 64,
        "norm_type": "layer_norm",
        "qkv_bias": True,
    },
    "llm_config": LANGUAGE,
    "npedit": {"stem": [4, 8], "answer_ids": [3, 5], "layer_scale": 0.5},
}


def read_golden(letter: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(GOLDEN / letter / "golden.safetensors")


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def image_index(token_ids: np.ndarray, placeholder: int = PLACEHOLDER) -> np.ndarray:
    """Counts the placeholders of each row."""
    found = token_ids == placeholder
    return np.where(found, np.cumsum(found, axis=-1) - 1, -1)


def apply(module: Scorer, params, *arguments, method: str | None = None):
    return jax.jit(lambda p, *x: module.apply({"params": p}, *x, method=method))(params, *arguments)


def random_params(module: Scorer):
    images, ids = np.zeros((1, 2, 8, 8, 3)), np.zeros((1, 1, 4), int)
    return fill(jax.eval_shape(module.init, jax.random.key(0), images, ids, ids + 1, ids))["params"]


def assert_logits(module, params, table, token_ids, mask, logits) -> None:
    """Compares with original logits [B, L, V]: all of them on tokens, and the answers, read at each row's last one."""

    def everywhere(scorer, table, ids, mask, index):
        hidden = scorer.language(scorer._embed(table, ids, index), token_positions(mask), causal_mask(mask))
        return scorer.language.unembed(hidden)

    arguments = (token_ids, mask.astype(bool), image_index(token_ids))
    found = apply(module, params, table, *arguments, method=everywhere)
    assert relative(found[arguments[1]], logits[arguments[1]]) <= FORWARD
    output = apply(module, params, table, *(x[:, None] for x in arguments), method="answer")
    last = [row[np.flatnonzero(m)[-1]] for row, m in zip(logits, mask, strict=True)]
    expected = np.stack(last).astype(np.float64)
    assert relative(output.logits[:, 0], expected[:, [NO, YES]]) <= FORWARD
    assert relative(output.logsumexp[:, 0], np.log(np.sum(np.exp(expected), axis=-1))) <= FORWARD


# Golden runs


def test_internvl_in_the_chat_layout_is_the_original():
    golden = read_golden("D")
    module, params = weights.load("internvl", GOLDEN / "D/internvl_chat")
    assert module.answer_ids == (NO, YES)  # from the tokenizer beside the weights
    pixels = np.repeat(np.repeat(channels_last(golden["ivl.px_lo"]), 8, axis=1), 8, axis=2)
    table = apply(module, params, pixels[None], method="encode_prepared")[0]
    assert relative(table.reshape(3, 16, 48), golden["ivl.vit"]) <= FORWARD
    # The first sample shows two images, the second one.
    tables = np.stack([table[:32], np.pad(table[32:], ((0, 16), (0, 0)))])
    token_ids, mask = golden["ivl.input_ids"], golden["ivl.attention_mask"]
    assert_logits(module, params, tables, token_ids, mask, golden["ivl.logits"])


def test_internvl_in_the_native_layout_is_the_original():
    golden = read_golden("D")
    module, params = weights.load("internvl", GOLDEN / "D/internvl_native", answer_ids=(NO, YES))
    table = apply(module, params, channels_last(golden["native.px"])[None], method="encode_prepared")[0]
    assert relative(table.reshape(3, 16, 48), golden["native.image_features"]) <= FORWARD
    token_ids, mask = golden["native.input_ids"], golden["native.attention_mask"]
    counts = (token_ids == PLACEHOLDER).sum(axis=1)
    ends = np.cumsum(counts)
    tables = np.stack(
        [np.pad(table[e - n : e], ((0, max(counts) - n), (0, 0))) for e, n in zip(ends, counts, strict=True)]
    )
    assert_logits(module, params, tables, token_ids, mask, golden["native.logits"])


@pytest.mark.parametrize("case", ["llava", "llava1"])
def test_llava_onevision_is_the_original(case):
    golden = read_golden("D")
    module, params = weights.load("llava_onevision", GOLDEN / "D/llava_onevision", answer_ids=(NO, YES))
    pixels = channels_last(golden[f"{case}.px"])
    if case == "llava":  # two images, each as it is
        table = apply(module, params, pixels[None, :, 0], method="encode_prepared")
    else:  # one image in tiles
        sizes = [tuple(int(n) for n in size) for size in golden["llava1.image_sizes"]]
        table = jax.jit(lambda p, x: module.apply({"params": p}, [x], sizes, method="encode_tiles"))(params, pixels[0])
    assert relative(table, golden[f"{case}.image_features"].reshape(table.shape)) <= FORWARD
    token_ids = golden[f"{case}.input_ids"]
    assert_logits(module, params, table, token_ids, np.ones_like(token_ids), golden[f"{case}.logits"])


def test_image_preparation_is_the_original():
    golden = read_golden("E")
    decoded = channels_last(golden["dec"][:, :, 0])
    prepared = image_preparation.prepare(decoded, 448)
    assert relative(np.moveaxis(prepared, -1, 1)[:, :, ::7, ::5], golden["prep_dec_sub"]) <= FORWARD
    prepared = np.asarray(prepared, np.float64)
    assert (
        relative([prepared.sum((0, 1, 2)), np.square(prepared).sum((0, 1, 2))], golden["prep_dec_moments"]) <= FORWARD
    )
    large = np.repeat(np.repeat(channels_last(golden["big.lo"][:, :, 0]), 8, axis=1), 8, axis=2)
    prepared = image_preparation.prepare(large, 448)
    assert relative(np.moveaxis(prepared, -1, 1)[:, :, ::7, ::5], golden["big.prep_sub"]) <= FORWARD
    for size in (28, 84):
        probe = channels_last(golden[f"prep{size}_probe"])
        value, pull = jax.vjp(lambda x, size=size: image_preparation.prepare(x, size), decoded)
        assert relative(value, channels_last(golden[f"prep{size}"])) <= FORWARD
        assert relative(pull(probe)[0], channels_last(golden[f"prep{size}_dx"][:, :, 0])) <= GRADIENT


def test_scorer_loss_and_pixel_gradients_are_the_original():
    """Four questions as a padded batch of four samples; the original runs them one by one without padding."""
    golden = read_golden("E")
    names = ["edit", "identity", "identity_remove", "remove"]
    module, params = weights.load("internvl", GOLDEN / "D/internvl_chat")
    reference, decoded = (np.repeat(channels_last(golden[name][:, :, 0]), 4, axis=0) for name in ("ref", "dec"))
    token_ids, index, answers = np.zeros((4, 443), int), np.full((4, 443), -1), []
    mask = np.zeros((4, 443), bool)
    for row, name in enumerate(names):
        labels = golden[f"{name}.labels"][0]
        place = int(np.flatnonzero((labels == NO) | (labels == YES))[0])
        token_ids[row, :place], mask[row, :place] = golden[f"{name}.input_ids"][0, :place], True
        # "remove" shows the second picture of its table alone.
        index[row] = np.where(token_ids[row] == PLACEHOLDER, image_index(token_ids[row]) + 16 * (name == "remove"), -1)
        answers.append(int(labels[place] == YES))

    @jax.jit
    def run(p, x, temperature):
        def loss(x):
            images = jnp.stack([reference, x], axis=1)
            logits = module.apply({"params": p}, images, *(y[:, None] for y in (token_ids, mask, index))).logits[:, 0]
            losses = -jnp.sum(jax.nn.log_softmax(logits * temperature) * jax.nn.one_hot(np.array(answers), 2), axis=-1)
            return jnp.sum(losses), (losses, logits)

        (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return *found, gradient

    for temperature in (0.1, 0.55, 1.0):
        losses, logits, gradient = run(params, decoded, temperature)
        for row, name in enumerate(names):
            assert relative(logits[row], golden[f"{name}.score_logits"][0]) <= FORWARD
            assert relative(losses[row], golden[f"{name}.T{temperature}.loss"][0]) <= FORWARD
            if temperature > 0.1:  # at 0.1 the original's loss alone was saved
                expected = channels_last(golden[f"{name}.T{temperature}.dpix"][0, :, 0])
                assert relative(gradient[row], expected) <= GRADIENT


def test_scorer_loss_of_a_large_picture_is_the_original():
    golden = read_golden("E")
    module, params = weights.load("internvl", GOLDEN / "D/internvl_chat")
    low = channels_last(golden["big.lo"][:, :, 0])
    large = np.repeat(np.repeat(low, 8, axis=1), 8, axis=2)
    small = np.stack([channels_last(golden[name][:, :, 0]) for name in ("ref", "dec")])
    tables = apply(module, params, small, method="encode_images")
    assert relative(tables, np.concatenate([golden["vit_ref"], golden["vit_dec"]])) <= FORWARD
    reference = tables[:1]
    token_ids = golden["edit.input_ids"][:, None, :442]

    def loss(p, x):
        edited = module.apply({"params": p}, x[:, None], method="encode_images")
        table = jnp.concatenate([jax.lax.stop_gradient(reference), edited], axis=1)
        mask, index = np.ones_like(token_ids), image_index(token_ids)
        output = module.apply({"params": p}, table, token_ids, mask, index, method="answer")
        return -jax.nn.log_softmax(output.logits[0, 0])[1], (edited, output.logits[:, 0])

    (value, (edited, logits)), gradient = jax.jit(jax.value_and_grad(loss, 1, has_aux=True))(params, large)
    assert relative(edited, golden["big.vit"]) <= FORWARD
    assert relative(logits, golden["big.score_logits"]) <= FORWARD
    assert relative([value], golden["big.loss"]) <= FORWARD
    assert relative(np.moveaxis(gradient, -1, 1)[:, :, None, ::9, ::7], golden["big.dpix_sub"]) <= GRADIENT
    assert relative(jnp.linalg.norm(gradient), golden["big.dpix_norm"]) <= GRADIENT


# Parity with transformers


def rename(name: str) -> str:
    """A parameter's name in transformers' memory -> in its files."""
    for theirs, ours in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def small_config(family: str) -> dict:
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 36}
    if family == "internvl":
        vision |= {"image_size": [24, 24], "patch_size": [4, 4], "attention_bias": True}
        return {
            "model_type": "internvl",
            "vision_config": vision | {"model_type": "internvl_vision"},
            "text_config": LANGUAGE | {"tie_word_embeddings": False},
            "image_token_id": 60,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        }
    vision |= {"image_size": 15, "patch_size": 5, "vision_use_head": False, "model_type": "siglip_vision_model"}
    return {
        "model_type": "llava_onevision",
        "vision_config": vision,
        "text_config": LANGUAGE | {"tie_word_embeddings": True},
        "image_token_index": 60,
        "image_grid_pinpoints": [[15, 30], [30, 15], [30, 30]],
        "tie_word_embeddings": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }


def their_logits(family: str, theirs: torch.nn.Module, token_ids: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of one sample with two images."""
    inputs = {"input_ids": torch.tensor(token_ids)[None], "attention_mask": torch.ones((1, len(token_ids)), dtype=int)}
    if family == "internvl":
        return theirs(**inputs, pixel_values=pixels).logits
    sizes = torch.tensor([pixels.shape[-2:]] * 2)
    return theirs(**inputs, pixel_values=pixels[:, None], image_sizes=sizes, batch_num_images=torch.tensor([2])).logits


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_every_gradient_is_that_of_transformers(family):
    config, kind = small_config(family), {"internvl": internvl, "llava_onevision": llava_onevision}[family]
    ours = kind.build(config, answer_ids=(3, 5))
    auto = transformers.AutoConfig.for_model(**config)
    theirs = randomise(transformers.AutoModelForImageTextToText.from_config(auto))
    rng = np.random.default_rng(2)
    rows, side = ours.image_tokens, ours.vision.image_size
    token_ids = np.concatenate([[1, 2], [60] * rows, [7], [60] * rows, [8, 9, 4]])
    pixels = torch.tensor(rng.normal(size=(2, 3, side, side)).astype(np.float32), requires_grad=True)
    logits = their_logits(family, theirs, token_ids, pixels)[0, -1]
    torch.nn.functional.cross_entropy(logits[[3, 5]][None], torch.tensor([1])).backward()
    table = kind.rows(ours)
    tensors = {rename(name): x for name, x in theirs.named_parameters()}
    params = to_flax(table, {name: x.detach().numpy() for name, x in tensors.items()})
    # What has no gradient in PyTorch is unused here too.
    expected = to_flax(table, {name: x.grad.numpy() for name, x in tensors.items() if x.grad is not None})

    def loss(p, x):
        images = ours.apply({"params": p}, x, method="encode_prepared")
        arguments = (token_ids[None, None], np.ones_like(token_ids)[None, None], image_index(token_ids, 60)[None, None])
        output = ours.apply({"params": p}, images, *arguments, method="answer")
        return -jax.nn.log_softmax(output.logits[0, 0])[1], output

    prepared = channels_last(pixels.detach().numpy())[None]
    (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, prepared)
    assert relative(output.logits[0, 0], logits.detach().numpy()[[3, 5]]) <= FORWARD
    assert relative(output.logsumexp[0, 0], torch.logsumexp(logits, 0).detach().numpy()) <= FORWARD
    assert_gradients(gradients[0], expected)
    assert relative(gradients[1][0], channels_last(pixels.grad.numpy())) <= GRADIENT


@pytest.mark.parametrize("size", [(20, 33), (40, 17), (31, 29), (15, 15), (11, 300)])
@pytest.mark.parametrize("max_tiles", [9, 1])
def test_any_resolution_rows_are_those_of_transformers(size, max_tiles):
    config = small_config("llava_onevision")
    auto = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        theirs = transformers.LlavaOnevisionModel(auto)
    resolutions = tuple(tuple(x) for x in config["image_grid_pinpoints"])
    grid = any_resolution.tile_grid(size, resolutions, 15)
    tiles = np.random.default_rng(3).normal(size=(1 + grid[0] * grid[1], 9, 32)).astype(np.float32)
    newline = np.arange(32, dtype=np.float32)
    expected, _ = theirs.pack_image_features(
        [torch.tensor(tiles)],
        torch.tensor([size]),
        torch.tensor(newline),
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
    )
    found = any_resolution.pack(jnp.asarray(tiles), jnp.asarray(newline), size, grid, max_tiles)
    assert relative(found, expected[0].numpy()) <= FORWARD


# Properties


@pytest.fixture(scope="module")
def small():
    module = internvl.build(SMALL)
    return module, random_params(module)


def questions(lengths: list[int], images: list[int], before: int = 0, after: int = 0):
    """Questions [1, Q, L] of these lengths about these numbers of images (16 rows each), padded on both sides."""
    rng = np.random.default_rng(4)
    width = max(n + 16 * i for n, i in zip(lengths, images, strict=True))
    rows = []
    for length, count_ in zip(lengths, images, strict=True):
        index = np.concatenate([np.full(1, -1), np.arange(16 * count_), np.full(length - 1, -1)])
        ids = np.where(index < 0, rng.integers(0, 61, len(index)), 60)
        place = (before + (width - len(index) if before else 0), after + (0 if before else width - len(index)))
        rows.append(
            [np.pad(x, place, constant_values=c) for x, c in ((ids, 0), (np.ones(len(ids), bool), False), (index, -1))]
        )
    return tuple(np.stack(x)[None] for x in zip(*rows, strict=True))


def test_padding_on_the_left_and_on_the_right_give_the_same(small):
    module, params = small
    table = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    expected = apply(module, params, table, *questions([5, 9], [2, 1]), method="answer")
    sides = [questions([5, 9], [2, 1], before, after) for before, after in ((0, 3), (3, 0))]
    asked = [np.concatenate(x, axis=1) for x in zip(*sides, strict=True)]
    found = apply(module, params, table, *asked, method="answer")
    for both in (found.logits[0, :2], found.logits[0, 2:]):
        assert relative(both, expected.logits[0]) <= FORWARD
    assert relative(found.logsumexp.reshape(2, 2), jnp.concatenate([expected.logsumexp] * 2)) <= FORWARD


def test_a_batch_of_questions_is_its_single_questions(small):
    module, params = small
    images = np.random.default_rng(1).uniform(-1.2, 1.2, (2, 2, 40, 56, 3)).astype(np.float32)
    asked = [np.repeat(x, 2, axis=0) for x in questions([5, 9, 3], [2, 1, 0])]
    together = apply(module, params, images, *asked)
    single = jax.jit(lambda *x: module.apply({"params": params}, *x))
    for sample in range(2):
        for q in range(3):
            one = [x[sample : sample + 1, q : q + 1] for x in asked]
            alone = single(images[sample : sample + 1], *one)
            assert relative(alone.logits[0, 0], together.logits[sample, q]) <= FORWARD
            assert relative(alone.logsumexp[0, 0], together.logsumexp[sample, q]) <= FORWARD


def test_each_question_may_have_answers_of_its_own(small):
    module, params = small
    table = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    asked, pairs = questions([5, 9], [2, 1]), [(3, 40), (7, 8)]
    found = apply(module, params, table, *asked, np.array([pairs]), method="answer")
    for q, pair in enumerate(pairs):
        expected = apply(module.clone(answer_ids=pair), params, table, *asked, method="answer")
        np.testing.assert_array_equal(found.logits[0, q], expected.logits[0, q])
        np.testing.assert_array_equal(found.logsumexp, expected.logsumexp)


def test_an_empty_question_is_finite_and_pulls_on_nothing(small):
    module, params = small
    table = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    ids, mask, index = questions([5, 9], [2, 1])
    mask[0, 1] = False

    def weighted(x):
        output = module.apply({"params": params}, x, ids, mask, index, method="answer")
        return jnp.sum(output.logits * jnp.array([[[1.0], [0.0]]])), output

    (_, output), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(table)
    assert jnp.isfinite(output.logits).all() and jnp.isfinite(output.logsumexp).all()
    assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0)


def test_packed_questions_are_the_padded_ones(small):
    module, params = small
    shared = 17  # tokens of their common beginning, the image among them
    table = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    ids, mask, index = questions([5, 9], [1, 1])
    ids[:, 1, :shared] = ids[:, 0, :shared]
    lengths = mask[0].sum(-1)
    spans = [(0, slice(0, shared))] + [(q, slice(shared, lengths[q])) for q in range(2)]
    row = {
        "ids": np.concatenate([ids[0, q, s] for q, s in spans] + [[0, 0]]),
        "position": np.concatenate([np.arange(s.start, s.stop) for _, s in spans] + [[0, 0]]),
        "segment": np.concatenate([np.full(s.stop - s.start, n) for n, (_, s) in enumerate(spans)] + [[-1, -1]]),
        "index": np.concatenate([index[0, q, s] for q, s in spans] + [[-1, -1]]),
    }
    places = np.array([[lengths[0] - 1, lengths[0] - shared + lengths[1] - 1]])

    def answers(method, *arguments):
        def total(p, x):
            output = module.apply({"params": p}, x, *arguments, method=method)
            return jnp.sum(output.logits * jnp.array([[[1.0, -2.0], [0.5, 3.0]]])), output

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, table)

    (_, padded), expected = answers("answer", ids, mask, index)
    (_, packed), found = answers("answer_packed", *(x[None] for x in row.values()), places)
    assert relative(packed.logits, padded.logits) <= FORWARD
    assert relative(packed.logsumexp, padded.logsumexp) <= FORWARD
    assert_gradients(found[0]["language"], jax.tree.map(np.asarray, expected[0]["language"]))
    assert relative(found[1], expected[1]) <= GRADIENT


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of every value a program makes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")}
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= shapes_of(inner)
    return found


def test_logits_are_made_at_the_answers_places_only(small):
    module, params = small
    asked = questions([5, 9], [2, 1])
    table = np.zeros((1, 32, 32), np.float32)

    def loss(p, x):
        output = module.apply({"params": p}, x, *asked, method="answer")
        return jnp.sum(output.logsumexp) + jnp.sum(output.logits)

    shapes = shapes_of(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, table).jaxpr)
    wide = {shape for shape in shapes if 61 in shape}
    assert (1, 2, 61) in wide
    assert all(np.prod(shape) <= 61 * 32 for shape in wide), wide  # the embedding table is the largest


def test_a_picture_of_the_right_size_is_not_resampled():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    mean, deviation = (np.asarray(x, np.float32) for x in image_preparation.IMAGENET)
    expected = ((images + 1) / 2 - mean) / deviation
    np.testing.assert_allclose(image_preparation.prepare(images, 64), expected, atol=1e-6)


def test_pixels_out_of_range_have_no_gradient():
    images = jnp.array([-1.5, -0.5, 0.5, 1.5]).reshape(1, 2, 2, 1) * jnp.ones((1, 1, 1, 3))
    gradient = jax.grad(lambda x: jnp.sum(image_preparation.prepare(x, 2)))(images)
    np.testing.assert_array_equal(gradient[0, :, :, 0] != 0, [[False, True], [True, False]])


# Sizes, settings, files


def test_small_scorer_has_sixteen_tokens_an_image_and_survives_its_files(small, tmp_path):
    module, params = small
    assert module.image_tokens == 16
    assert module.answer_ids == (3, 5)
    assert internvl.build(json.loads(json.dumps(internvl.describe(module)))) == module
    weights.save("internvl", module, params, tmp_path / "saved")
    again, read = weights.load("internvl", tmp_path / "saved")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(params))


@pytest.mark.parametrize("source", ["internvl_chat", "internvl_native", "llava_onevision"])
def test_config_round_trip(source):
    kind = llava_onevision if source == "llava_onevision" else internvl
    module = kind.build(json.loads((GOLDEN / "D" / source / "config.json").read_text()))
    assert kind.build(json.loads(json.dumps(kind.describe(module)))) == module


INTERNVIT = {
    "300M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "6B": {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
           "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
}  # fmt: skip
QWEN2_5 = {  # width, layers, heads, kv_heads, mlp_width
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "14B": (5120, 48, 40, 8, 13824),
    "32B": (5120, 64, 40, 8, 27648),
    "72B": (8192, 80, 64, 8, 29568),
}
INTERNVL = {  # of InternVL2.5, 1B, 4B, 38B and 78B are built on Qwen2.5
    "InternVL3-1B": ("300M", "0.5B"),
    "InternVL3-2B": ("300M", "1.5B"),
    "InternVL2_5-4B": ("300M", "3B"),
    "InternVL3-8B": ("300M", "7B"),
    "InternVL3-14B": ("300M", "14B"),
    "InternVL3-38B": ("6B", "32B"),
    "InternVL3-78B": ("6B", "72B"),
}


def qwen2_5(size: str, vocabulary: int) -> dict:
    width, layers, heads, kv_heads, mlp_width = QWEN2_5[size]
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("name", INTERNVL)
def test_internvl_of_every_size_is_as_large_as_that_of_transformers(name):
    vision, language = INTERNVL[name]
    config = {
        "model_type": "internvl",
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14],
                          "attention_bias": True} | INTERNVIT[vision],
        "text_config": qwen2_5(language, 151674),
    }  # fmt: skip
    module = internvl.build(config, answer_ids=(2753, 9454))
    assert module.image_tokens == 256
    ids = jax.ShapeDtypeStruct((1, 2, 300), jnp.int32)
    images = jax.ShapeDtypeStruct((1, 2, 512, 384, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images, ids, ids, ids)["params"]
    if language == "14B":
        assert count(shapes["language"]) == 14_766_040_064
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**config))
    assert count(shapes) == sum(x.numel() for x in theirs.parameters())
    if known := published.architecture(f"anywhere/{name}"):
        row = kinds.parameter_shapes("internvl", kinds.build("internvl", known))
        assert sorted(row.values()) == sorted(leaf.shape for leaf in jax.tree.leaves(nn.unbox(shapes)))


@pytest.mark.parametrize(("size", "tied"), [("0.5B", True), ("7B", False)])
def test_llava_onevision_is_as_large_as_that_of_transformers(size, tied):
    config = {
        "model_type": "llava_onevision",
        "tie_word_embeddings": tied,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 26,
                          "num_attention_heads": 16, "intermediate_size": 4304, "image_size": 384, "patch_size": 14,
                          "vision_use_head": False},
        "text_config": qwen2_5(size, 152000) | {"tie_word_embeddings": tied},
    }  # fmt: skip
    module = llava_onevision.build(config, answer_ids=(2753, 9454))
    assert module.image_tokens == 730
    ids = jax.ShapeDtypeStruct((1, 1, 800), jnp.int32)
    images = jax.ShapeDtypeStruct((1, 1, 512, 384, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images, ids, ids, ids)["params"]
    ours = count(shapes) + 2 * 1152  # SigLIP's final norm is unused
    if size == "7B":
        assert ours == 8_029_890_080
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**config))
    assert ours == sum(x.numel() for x in theirs.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "idefics"}, "idefics"),
        ({"select_layer": -4}, "select_layer"),
        ({"downsample_ratio": 0.4}, "downsample_ratio"),
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "internlm2"),
        ({"vision_config": SMALL["vision_config"] | {"norm_type": "batch_norm"}}, "batch_norm"),
        ({"vision_config": SMALL["vision_config"] | {"image_size": [64, 32]}}, "squares"),
    ],
)
def test_configs_of_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        internvl.build(SMALL | change)


def test_arguments_that_do_not_fit_are_refused(small):
    module, params = small
    ids, mask, index = questions([5], [1])
    table = np.zeros((1, 16, 32), np.float32)
    with pytest.raises(ValueError, match="one shape"):
        apply(module, params, table, ids, mask[:, :, :-1], index, method="answer")
    with pytest.raises(ValueError, match="answer_ids"):
        apply(module.clone(answer_ids=None), params, table, ids, mask, index, method="answer")
    with pytest.raises(ValueError, match="found 9 patches"):
        ShuffleProjector(8).init(jax.random.key(0), jnp.zeros((1, 10, 4)))
    with pytest.raises(ValueError, match="no resolutions"):
        any_resolution.tile_grid((20, 20), NewlineProjector(8).resolutions, 15)
    with pytest.raises(ValueError, match="found 2"):
        any_resolution.pack(jnp.zeros((2, 9, 4)), jnp.zeros(4), (30, 30), (2, 2), 9)


def test_a_row_beyond_the_table_is_not_a_number(small):
    module, params = small
    ids, mask, index = questions([5], [2])
    output = apply(module, params, np.zeros((1, 16, 32), np.float32), ids, mask, index, method="answer")
    assert jnp.isnan(output.logits).all()
