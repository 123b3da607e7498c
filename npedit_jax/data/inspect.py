"""Real batches as the model will see them: `python -m npedit_jax.data.inspect --config X --output page.html`.

Every text on the page is decoded from the batch's token ids, every picture is the batch's own; no weights are read.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from npedit_jax.data import easyvqa, edit_types, pages
from npedit_jax.data.batches import NOTES, Sample
from npedit_jax.data.tokenize import read_tokenizer

_BODY = """
<p>{{ config }} · {{ batches | length }} batches from step {{ start }} on. Texts are decoded from token ids; runs of
image tokens are written as their number.</p>
{% for batch in batches %}
<h2>Step {{ batch.step }}{% if batch.inner %}, inner batch {{ batch.inner }}{% endif %}, {{ batch.size }}</h2>
{% for sample in batch.samples %}
<div class="sample">
<figure>{% for name, pixels in sample.pictures %}{{ picture(pixels, 176) }}<figcaption>{{ name }}</figcaption>
{% endfor %}</figure>
<div><dl>
{% for name, value, bad in sample.fields %}
<dt>{{ name }}</dt><dd{% if bad %} class="bad"{% endif %}>{{ value }}</dd>
{% endfor %}
</dl></div>
</div>
{% endfor %}
{% endfor %}
"""
_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file under configs/.", lock_config=True)
_OUTPUT = flags.DEFINE_string("output", "batches.html", "The page to write.")
_START = flags.DEFINE_integer("start", 0, "The first step to show.")
_STEPS = flags.DEFINE_integer("steps", 2, "How many steps.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "How many samples of each batch.")


def write(
    output: str,
    title: str,
    steps: Mapping[int, Sample],
    tokenizers: Mapping[str, Any],
    types: Sequence[str],
    *,
    samples: int,
    inner: bool,
) -> None:
    """Writes the page.

    Args:
      steps: batches by step.
      tokenizers: "text" and, where there are questions, "scorer": what gave the ids.
      types: names of the edit types by their number.
      samples: how many of each batch.
      inner: whether batches have a leading axis of inner batches.
    """
    shown = []
    for step, batch in steps.items():
        parts = [_at(batch, place) for place in range(len(batch[NOTES]["id"]))] if inner else [batch]
        for place, part in enumerate(parts):
            image = next(value for value in part.values() if getattr(value, "dtype", None) == np.uint8)
            height, width = image.shape[-3:-1]
            rows = [_shown(_at(part, row), tokenizers, types) for row in range(min(samples, len(image)))]
            label = f"{place + 1} of {len(parts)}" if inner else ""
            shown.append({"step": step, "inner": label, "size": f"{height} x {width}", "samples": rows})
    pages.write(output, "Batches", _BODY, config=title, start=min(steps), batches=shown)


def _at(batch: Sample, place: int) -> Sample:
    """One sample or inner batch; what a batch shares, with an axis of 1, goes to each."""
    found = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            found[name] = {key: part[place] for key, part in value.items()}
        else:
            found[name] = value[min(place, len(value) - 1)]
    return found


def _shown(sample: Sample, tokenizers: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """The pictures and (name, value, whether it is bad) of a sample's fields."""
    pictures, fields, notes = [], [], sample[NOTES]
    for name, value in sample.items():
        if getattr(value, "dtype", None) == np.uint8:
            pictures += [(name, value)] if value.ndim == 3 else [(f"{name} {n}", x) for n, x in enumerate(value)]
    fields.append(("record", str(notes["id"]), False))
    if notes["reason"]:
        fields.append(("bad", f"{notes['reason']}: {notes['message']}", True))
    if notes["cut"]:
        fields.append(("cut", "a text is longer than its configured length", True))
    for name in ("instruction", "caption", "negative"):
        if f"{name}_ids" in sample:
            mask = sample[f"{name}_mask"]
            text = tokenizers["text"].decode(sample[f"{name}_ids"][mask].tolist(), skip_special_tokens=False)
            fields.append((f"{name}, {mask.sum()} of {mask.size} tokens", text, False))
    fields += _questions(sample, tokenizers)
    if "edit_type" in sample:
        fields.append(("edit_type", types[sample["edit_type"]], False))
    for name in ("guidance", "weight", "dmd_weight", "identity_weight"):
        if name in sample:
            fields.append((name, f"{sample[name]}", name == "weight" and not sample[name]))
    return {"pictures": pictures, "fields": fields}


def _questions(sample: Sample, tokenizers: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """The prompt of each question as the scorer reads it, with the wanted answer and its weight."""
    found = []
    for place in range(len(sample.get("question_weight", ()))):
        ids, images = _prompt(sample, place)
        runs = np.flatnonzero(np.diff(images >= 0, prepend=False, append=False)).reshape(-1, 2).tolist()
        text, done = "", 0
        for first, last in runs:
            text += tokenizers["scorer"].decode(ids[done:first].tolist(), skip_special_tokens=False)
            text += f"[{last - first} tokens, rows {images[first]} to {images[last - 1]} of the images]"
            done = last
        text += tokenizers["scorer"].decode(ids[done:].tolist(), skip_special_tokens=False)
        answer, weight = sample["answer"][place], sample["question_weight"][place]
        found.append((f"question {place + 1}, {len(ids)} tokens, answer {answer:g}, weight {weight:g}", text, False))
    return found


def _prompt(sample: Sample, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and image rows of one question, from a row of its own or from the packed one."""
    if "question_ids" in sample:
        mask = sample["question_mask"][place]
        return sample["question_ids"][place][mask], sample["image_index"][place][mask]
    segments, end = sample["packed_segments"], int(sample["answer_place"][place])
    chosen = (segments == 0) | (segments == segments[end])
    return sample["packed_ids"][chosen], sample["packed_image_index"][chosen]


def main(argv: list[str]) -> int:
    """Command line."""
    del argv
    logging.set_verbosity(logging.WARNING)
    from npedit_jax.training import datasets, networks, stages  # the command stands above the stages, the module below

    config = _CONFIG.value
    try:
        stages.check(config)
        modules = {}
        if "scorer" in config.networks:
            modules["scorer"] = networks.module_of(config.networks.scorer)
        dataset = datasets.build(config, modules)
        steps = {step: dataset[step] for step in range(_START.value, _START.value + _STEPS.value)}
        names = {"text": "text_tokenizer", "scorer": "scorer_tokenizer"}
        tokenizers = {
            name: read_tokenizer(networks.resolve(config.data[field]))
            for name, field in names.items()
            if field in config.data
        }
        types = edit_types.EDIT_TYPES if "records" in config.data else easyvqa.EDIT_TYPES
        write(
            _OUTPUT.value,
            f"Stage {config.stage}",
            steps,
            tokenizers,
            types,
            samples=_SAMPLES.value,
            inner=config.stage == "npedit",
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 1
    print(_OUTPUT.value)
    return 0


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
