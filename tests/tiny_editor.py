"""A run directory as training leaves it, of an editor that edits within a second, with networks full of noise."""

import pathlib
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from npedit_jax import weights
from npedit_jax.training import networks, state, workdirs
from npedit_jax.training.checkpoint import Checkpoints
from tests.training import tiny, tiny_networks

# Those of the training tests, with what a text encoder and a scorer with the shipped tokenizers need, and attention in
# every network.
AUTOENCODER = tiny.AUTOENCODER | dict(
    block_out_channels=(8, 8), latent_channels=4, scaling_factor=0.7, shift_factor=0.1, mid_block_add_attention=True
)
WIDER = dict(num_attention_heads=2, num_key_value_heads=1)
TEXT_ENCODER = (
    dict(
        tiny_networks.SPECS["text_encoder"][1],
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
    )
    | WIDER
)
STUDENT = dict(
    tiny_networks.DENOISER,
    in_channels=4,
    dim=32,
    n_layers=2,
    n_heads=2,
    cap_feat_dim=16,
    axes_dims=(4, 6, 6),
    axes_lens=(160, 16, 16),
    npedit={},  # Z-Image's own: the release's Python reads it too
)
_SCORER = tiny_networks.SPECS["scorer"][1]
SCORER = _SCORER | dict(
    vision_config=_SCORER["vision_config"]
    | dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, patch_size=16, image_size=64),
    llm_config=_SCORER["llm_config"]
    | WIDER
    | dict(vocab_size=71, hidden_size=32, intermediate_size=40, tie_word_embeddings=False),
    npedit=dict(answer_ids=(7, 8)),
)


def write_run(
    root: pathlib.Path,
    tokenizer: str,
    sampling: dict[str, Any],
    student: dict[str, Any] | None = None,
    *,
    scorer: bool = False,
    buckets: tuple[tuple[int, int], ...] = (),
) -> pathlib.Path:
    """Writes `root/run`, and its frozen networks beside it.

    Args:
      tokenizer: directory of the text encoder's tokenizer.
      sampling: of the run's config.
      student: fields of its config.json to change.
      scorer: the run learned from one, with easy-VQA's questions.
      buckets: sizes (height, width) that it was trained at.
    """
    parts = {
        "autoencoder": ("autoencoder", AUTOENCODER),
        "text_encoder": ("qwen3", TEXT_ENCODER),
        "student": ("zimage", STUDENT | (student or {})),
    }
    parts |= {"scorer": ("internvl", SCORER)} if scorer else {}
    specs, params = {}, {}
    for name, (kind, architecture) in parts.items():
        module = weights.build(kind, networks.plain(architecture))
        params[name] = noise(networks.shapes(kind, module))
        weights.save(kind, module, params[name], root / name)
        specs[name] = dict(kind=kind, directory=str(root / name), architecture={}, options={})
    data = dict(text_tokenizer=tokenizer, text_length=48)
    if scorer:
        data |= dict(scorer_tokenizer="package:pretrained/easyvqa/scorer", question_length=48, templates="easyvqa")
    if buckets:
        data |= dict(buckets=buckets)
    config = ConfigDict(
        dict(stage="npedit", seed=0, networks=specs, optimizer=dict(student={}), data=data, sampling=sampling)
    )
    workdirs.open_run(root / "run", config)
    trained = {"student": params["student"]}
    final = state.create(trained, {"student": optax.sgd(0.1)}, ("student",))
    final = final.replace(ema={"student": jax.tree.map(lambda x: 0.9 * x, params["student"])})
    checkpoints = Checkpoints(root / "run", every=1, keep=1)
    checkpoints.save(1, final, {}, force=True)
    checkpoints.close()
    return root / "run"


def noise(shapes: Any) -> Any:
    """Parameters of these shapes: kernels that keep the scale of what they take, norms near 1, the rest small."""
    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        fan_in = np.prod(x.shape[-4:-1] if "conv" in str(path) else x.shape[-2:-1])
        deviation = fan_in**-0.5 if name == "kernel" else 0.2
        return (rng.normal(size=x.shape) * deviation + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)
