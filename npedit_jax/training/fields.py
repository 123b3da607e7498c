"""The fields of a config, by stage: one that is missing or misspelt is an error, none has a hidden default.

What a function or a class takes by name (`step`, `optimizer`, the options of data and networks) it checks itself, and
tells which of it may be left out.
"""

import functools
from collections.abc import Mapping

import ml_collections

_TEXT = ("text_tokenizer", "text_length")
_QUESTIONS = ("scorer_tokenizer", "question_length", "templates")
_EDITING = ("times", "sampler", "eta")
ALL = {
    "": ("stage", "seed", "steps", "batch_size", "cpu_devices", "networks", "data", "step", "optimizer", "mesh",
         "offload", "checkpoint", "guard", "log"),
    "data": ("reading", "options"),
    "data.reading": ("workers", "threads", "buffer", "max_bad_share"),
    "mesh": ("data", "fsdp", "tensor"),
    "checkpoint": ("every", "keep"),
    "guard": ("skipped_share", "window", "data_seconds"),
    "log": ("every", "preview_every", "wandb_project", "profile_steps"),
}  # fmt: skip
OF_STAGE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "autoencoder": {},
    "base": {"": ("sampling",), "data": _TEXT, "sampling": ("steps", "time_shift")},
    "scorer": {"data": _QUESTIONS},
    "warmup": {"": ("sampling",), "data": _TEXT, "sampling": _EDITING},
    "npedit": {
        "": ("sampling", "fake_updates", "separate_steps"),
        "data": (*_TEXT, *_QUESTIONS),
        "sampling": _EDITING,
    },
    "supervised": {"": ("sampling",), "data": _TEXT, "sampling": _EDITING},
}
# A config has all fields of a choice, or none: adapters, records in the place of easy-VQA, several tasks, questions.
CHOICES = (
    ("", ("lora",)),
    ("data", ("records", "buckets")),
    ("data", ("tasks", "task_prefix")),
    ("data", ("questions",)),
)
# Of the options of data, the rest of which the stage's function takes by name.
FROM_SOURCE = ("autoencoder", "base", "warmup", "npedit")
SOURCE = ("fraction",)
RECORDS = ("flip",)
LORA = ("rank", "alpha", "targets", "base", "start")
# Whole numbers above 0.
COUNTS = ("steps", "batch_size", "cpu_devices", "checkpoint.every", "checkpoint.keep", "log.every", "log.preview_every")
NETWORK = ("kind", "directory", "architecture", "options")


def check(config: ml_collections.ConfigDict) -> None:
    """Checks that a config of a known stage has the fields of its stage and no others, and the counts among them.

    Raises:
      ValueError: some are missing or unknown, which are named, or a count is below 1.
    """
    of_stage = OF_STAGE[config.stage]
    for part in dict.fromkeys((*ALL, *of_stage)):
        found, names = _part(config, part), (*ALL.get(part, ()), *of_stage.get(part, ()))
        for place, choice in CHOICES:
            names += choice if place == part and any(name in found for name in choice) else ()
        _check(part, found, names)
    for name in COUNTS:
        part, _, last = name.rpartition(".")
        if (count := _part(config, part)[last]) < 1:
            raise ValueError(f"config.{name} must be 1 or more, found {count}")
    if config.stage in FROM_SOURCE:
        needed = (*SOURCE, *RECORDS) if "records" in config.data else SOURCE
        _check("data.options", config.data.options, needed, others=True)
    for name in config.networks:
        _check(f"networks.{name}", config.networks[name], NETWORK)
    if "lora" in config:
        _check("lora", config.lora, LORA)


def _part(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    return functools.reduce(lambda part, key: part[key], filter(None, name.split(".")), config)


def _check(part: str, found: ml_collections.ConfigDict, names: tuple[str, ...], *, others: bool = False) -> None:
    missing = [name for name in names if name not in found]
    unknown = [] if others else [name for name in found if name not in names]
    if missing or unknown:
        told = [f"{word} {', '.join(wrong)}" for word, wrong in (("lacks", missing), ("has unknown", unknown)) if wrong]
        place = f"config.{part}" if part else "config"
        raise ValueError(f"{place} {' and '.join(told)}; its fields are {', '.join(names)}")
