"""NP-Edit at full size: Z-Image becomes a four-step editor, taught by InternVL3-14B, without a pair.

Pod: python -m npedit_jax.train --config configs/zimage/npedit.py --workdir gs://BUCKET/npedit \
    --config.data.records=/mnt/BUCKET/records/edits/NAME/1.0.0
The weights are those of Hugging Face (Tongyi-MAI/Z-Image, OpenGVLab/InternVL3-14B) under weights/, and the student
that configs/zimage/warmup.py came to, taken out of its run by npedit_jax.export.

Ablations, each the command above with one more line; the scorer is of 14 B without:
  scorer of 1 B           --config.networks.scorer.directory=weights/InternVL3-1B
  scorer of 2 B           --config.networks.scorer.directory=weights/InternVL3-2B
  scorer of 8 B           --config.networks.scorer.directory=weights/InternVL3-8B
  1 % of the images       --config.data.options.fraction=0.01
  10 % of the images      --config.data.options.fraction=0.1
  all tokens in the loss  --config.step.scorer_form=vocabulary
  no temperature          --config.step.temperature_start=1.0
  no identity question    --config.data.options.question_weights=(1.0,0.0)
  no scorer               --config.step.scorer_weight=0.0
  no DMD                  --config.step.dmd_weight=0.0 --config.fake_updates=0
  one step unrolled       --config.step.max_unroll=1
  decoupled DMD           --config.step.decoupled=True
  one program of all      --config.separate_steps=False
"""

from ml_collections import ConfigDict

from npedit_jax.data.buckets import BUCKETS

# The release's: the paper's (1.0, 0.75, 0.5, 0.25) under Z-Image's time shift of 6, which the warm-up has as well.
TIMES = (1.0, 0.9474, 0.8571, 0.6667)
# Of each host: processes that decode and tokenize, threads and ready batches in each, the share of bad records that
# ends the run.
READING = dict(workers=16, threads=1, buffer=1, max_bad_share=0.01)
EDIT_TYPES = ("local_color_change", "texture", "shape_change", "insertion", "replace", "background_change", "style",
              "action", "text")  # fmt: skip
STRONG = ("remove", "shape_change", "style", "action")  # edits that need a strong push away from the reference
NOTHING = 0.01
FLASH = dict(implementation="splash")  # TPU; "cudnn" on a GPU, "xla" anywhere


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = ConfigDict()
    config.stage = "npedit"
    config.seed = 0
    config.steps = 10_000  # a budget of ours for this batch size; the release: 14,000
    config.batch_size = 64  # over all chips, one each on a v5p:4x4x4, as many samples as fit; the release: 1 per device
    config.fake_updates = 5  # per student update, the release's; the paper: 10, at nearly twice the time of a step
    config.separate_steps = True  # a program per update and length: each compiles in minutes and needs less memory
    config.cpu_devices = 1

    config.networks = ConfigDict()
    config.networks.autoencoder = network("autoencoder", "weights/Z-Image/vae", dtype="float32", remat="full")
    config.networks.text_encoder = frozen("qwen3", "weights/Z-Image/text_encoder")
    config.networks.real_score = frozen("zimage", "weights/Z-Image/transformer", **FLASH)
    # Trained parameters stay in float32; the release's are bfloat16, where an update of this rate is rounded away.
    trained = dict(dtype="bfloat16", remat="full", **FLASH)
    config.networks.fake_score = network("zimage", "weights/Z-Image/transformer", **trained)
    config.networks.student = network("zimage", "weights/warmed-up/Z-Image/transformer", **trained)
    config.networks.scorer = frozen("internvl", "weights/InternVL3-14B", remat="full")
    config.data = data()
    config.data.scorer_tokenizer = config.networks.scorer.get_ref("directory")  # follows what the command line says
    config.step = ConfigDict(
        dict(
            times=TIMES,
            max_unroll=2,
            dmd_weight=1.0,
            scorer_weight=0.02,
            identity_weight=1.0,  # on "do nothing" samples
            dmd_normalizer="pixel",  # the release's; "sample" is that of DMD's own paper
            dmd_low=0.02,
            dmd_high=0.98,
            time_shift=1.0,
            decoupled=False,  # the release has hooks for it, and this and the next five numbers are ours
            matching_weight=1.0,
            guidance_weight=1.0,
            guidance_low=0.02,
            guidance_high=0.98,
            guidance_shift=1.0,
            scorer_form="yes_no",
            temperature_start=0.1,
            temperature_end=1.0,
            temperature_steps=2000,
            scorer_clip=False,  # options of ours that are off, this and the next
            scorer_noise=0.0,
            ema=0.999,  # less in the first 9,000 steps, (1 + step) / (10 + step); the release configures it, keeps none
            skip_norm=300.0,
            accumulate=1,  # parts of a batch, one after the other: a larger batch in the same memory
        )
    )
    adam = dict(
        name="adam",
        learning_rate=2e-5,
        final_learning_rate=2e-5,
        warmup_steps=0,
        b1=0.0,
        b2=0.9,
        weight_decay=0.0,
        clip_norm=2.0,
    )
    config.optimizer = ConfigDict(dict(student=adam, fake_score=adam))
    config.sampling = ConfigDict(dict(times=config.step.get_ref("times"), sampler="ddim", eta=1.0))
    config.mesh = ConfigDict(dict(data=-1, fsdp=16, tensor=1))  # docs/pods.md: which sizes for which pod
    config.offload = ()  # "optimizer" or names of frozen networks: in the hosts' memory between the updates
    config.checkpoint = ConfigDict(dict(every=250, keep=3))  # what a spot slice loses at most; the release: 1,000
    config.guard = ConfigDict(dict(skipped_share=0.2, window=100, data_seconds=600.0))
    # wandb_project: of Weights & Biases, "" for none; profile_steps: first and last step of a jax.profiler trace.
    config.log = ConfigDict(dict(every=10, preview_every=250, wandb_project="", profile_steps=()))
    return config


def data() -> ConfigDict:
    """Reference images, instructions and captions; static lengths in tokens."""
    shares = {"remove": 0.25} | dict.fromkeys(EDIT_TYPES, 0.75 / len(EDIT_TYPES))
    return ConfigDict(
        dict(
            records="records/edits/edits/1.0.0",
            buckets=BUCKETS,
            reading=READING,
            text_tokenizer="weights/Z-Image/tokenizer",
            text_length=512,
            scorer_tokenizer="",
            question_length=768,  # 256 per image, and room for an instruction of some 150
            templates="editing",
            options=dict(
                edit_weights={name: (1.0 - NOTHING) * share for name, share in shares.items()} | {"nothing": NOTHING},
                guidance={name: 7.5 if name in STRONG else 3.5 for name in (*shares, "nothing")},
                question_weights=(1.0, 1.0),
                negative_prompt="low quality, artifacts",
                packed_length=1024,  # both questions in one row; the release runs each by itself, with equal results
                fraction=1.0,
                flip=0.0,
            ),
        )
    )


def network(kind: str, directory: str, **options: str) -> ConfigDict:
    """One network with the directory of its weights."""
    return ConfigDict(dict(kind=kind, directory=directory, architecture={}, options=options))


def frozen(kind: str, directory: str, **options: str) -> ConfigDict:
    """A network that is never trained, kept and computed in bfloat16."""
    return network(kind, directory, dtype="bfloat16", param_dtype="bfloat16", **options)
