"""The small scorer of the easy-VQA experiment: an InternVL-type model that answers Yes or No about one or two images.

It plays the pretrained vision-language model, so it may see pairs; the editor never does.

Laptop: python -m npedit_jax.train --config configs/easyvqa/scorer.py --workdir runs/easyvqa-scorer
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "scorer"
    config.seed = 0
    config.steps = 3800
    config.batch_size = 32
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = network("autoencoder", "package:pretrained/easyvqa/vae")
    config.networks.scorer = network(
        "internvl",
        architecture=dict(
            model_type="internvl_chat",
            downsample_ratio=0.5,
            ps_version="v2",
            select_layer=-1,
            vision_config=dict(
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=384,
                patch_size=8,
                image_size=64,
                layer_norm_eps=1e-6,
                norm_type="layer_norm",
                hidden_act="gelu",
                qkv_bias=True,
                qk_normalization=False,
            ),
            llm_config=dict(
                architectures=["Qwen2ForCausalLM"],
                model_type="qwen2",
                vocab_size=72,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-6,
                rope_theta=10000.0,
                tie_word_embeddings=True,
                hidden_act="silu",
            ),
            # Only the small experiment has a stem: outlines are finer than a patch of 8 pixels.
            # The answers are (No, Yes) in its tokenizer.
            npedit=dict(stem=(32, 64, 128), layer_scale=1.0, answer_ids=(7, 8)),
        ),
    )
    config.data = ConfigDict(
        dict(
            reading=dict(workers=0, threads=1, buffer=4, max_bad_share=0.01),
            scorer_tokenizer="package:pretrained/easyvqa/scorer",
            question_length=72,  # tokens, of which 16 per image
            templates="easyvqa",
            options=dict(questions=6, packed_length=144),
        )
    )
    config.step = ConfigDict(dict(ema=0.99, skip_norm=100.0, roundtrip=0.5, latent_noise=0.3))
    config.optimizer = ConfigDict(
        dict(
            scorer=dict(
                name="muon",
                learning_rate=1.5e-3,
                adam_factor=0.67,  # a higher rate of embeddings and norms drowns what pictures have to say
                final_learning_rate=1e-4,
                warmup_steps=20,
                b1=0.95,
                b2=0.99,
                weight_decay=0.0,
                clip_norm=5.0,
            )
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=250, keep=2))
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=20, preview_every=1000, wandb_project="", profile_steps=()))
    return config


def network(kind: str, directory: str = "", architecture: dict | None = None) -> ConfigDict:
    """One network: its weights' directory, or the architecture of a fresh one."""
    return ConfigDict(dict(kind=kind, directory=directory, architecture=architecture or {}, options={}))
