"""The data of each stage: which pipeline over which images and records, tokenized for its networks."""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import ml_collections

from npedit_jax import parallel
from npedit_jax.data import easyvqa, pipeline, questions, scorer_pairs
from npedit_jax.data.batches import Feed
from npedit_jax.data.easyvqa_source import EasyVQASource
from npedit_jax.data.records import Records
from npedit_jax.data.sources import RecordSource, Source
from npedit_jax.data.tokenize import ScorerTokenizer, TextTokenizer
from npedit_jax.sampling import Modules
from npedit_jax.training import networks

Config = ml_collections.ConfigDict


def build(config: Config, modules: Modules) -> grain.MapDataset:
    """This host's share of each batch of the config's stage, as dictionaries of numpy arrays.

    Args:
      modules: of the stage's networks. Only the scorer's is looked at, by the stages that ask questions: how many
        tokens an image takes.
    """
    return _OF_STAGE[config.stage](config, modules)


def inner_batches(config: Config) -> int:
    """Length of the axis before the batch axis, 0 for none."""
    return config.fake_updates + 1 if config.stage == "npedit" else 0


def _feed(config: Config) -> Feed:
    places, of = parallel.host_places(parallel.make_mesh(**config.mesh.to_dict()))
    parts = config.step.get("accumulate", 1)
    if config.batch_size % (of * parts):
        raise ValueError(
            f"batch_size must be a multiple of {of} x {parts}: the places of mesh axes data and fsdp that the samples "
            f"are spread over, times the parts of step.accumulate; found {config.batch_size}. Change one of them"
        )
    return Feed(config.seed, config.batch_size * len(places) // of, places, of, inner_batches(config))


def _images(config: Config, modules: Modules) -> grain.MapDataset:
    del modules
    source, options = _source(config)
    return pipeline.stage_dataset(config.stage, source, _feed(config), **options)


def _images_with_text(config: Config, modules: Modules) -> grain.MapDataset:
    del modules
    source, options = _source(config)
    return pipeline.stage_dataset(config.stage, source, _feed(config), text=_text(config), **options)


def _easyvqa_pairs(config: Config, modules: Modules) -> grain.MapDataset:
    del modules
    data, options = easyvqa.load("train"), config.data.options.to_dict()
    return pipeline.supervised(data, _feed(config), text=_text(config), **options)


def _scorer_pairs(config: Config, modules: Modules) -> grain.MapDataset:
    templates, data = _templates(config.data), easyvqa.load("train")
    pairs = scorer_pairs.PairSource(data, templates, config.data.options.questions)
    tokenizer = _questions(config, modules["scorer"].image_tokens)
    options = dict(tokenizer=tokenizer, templates=templates, pairs=pairs, **config.data.options.to_dict())
    return pipeline.scorer(data, _feed(config), **options)


def _edits(config: Config, modules: Modules) -> grain.MapDataset:
    source, options = _source(config)
    weights = options.pop("edit_weights")
    tasks = {"": pipeline.Task(source, weights, _templates(config.data))}
    if "tasks" in config.data:
        tasks = {name: _task(config, name, weights) for name in config.data.tasks}
    scorer = _questions(config, modules["scorer"].image_tokens)
    return pipeline.npedit(tasks, _feed(config), text=_text(config), scorer=scorer, **options)


def _task(config: Config, name: str, weights: Mapping[str, float]) -> pipeline.Task:
    """One of several tasks: editing with all edit types, or another, which is an edit type of its own."""
    spec = config.data.tasks[name]
    source, _ = _source(config, spec.records or config.data.records)
    return pipeline.Task(
        source,
        weights if name == "editing" else {name: 1.0},
        _templates(spec),
        questions.TASK_PREFIXES[name] if config.data.task_prefix else "",
        spec.weight,
    )


def _source(config: Config, records: str = "") -> tuple[Source, dict[str, Any]]:
    """Where samples come from, and the options that are left for the stage."""
    options = config.data.options.to_dict()
    fraction = options.pop("fraction")
    if "records" not in config.data:
        return EasyVQASource(easyvqa.load("train").fraction(fraction)), options
    sets, weights = _sets(records or config.data.records)
    flip = options.pop("flip")
    return RecordSource(sets, config.data.buckets, weights=weights, fraction=fraction, flip=flip), options


def _sets(paths: str) -> tuple[dict[str, Records], dict[str, float]]:
    """Sets of records by their name, and their weights: "DIR" or "DIR=WEIGHT,DIR=WEIGHT".

    The name is the manifest's, or else the directory's: of all prepared sets that is "1.0.0".
    """
    sets, weights = {}, {}
    for path in paths.split(","):
        directory, _, weight = path.partition("=")
        found = Records(directory)
        name = found.manifest.get("name") or found.directory.name
        if name in sets:
            told = "give one another name in its manifest.json"
            raise ValueError(f"two sets of records are called {name!r} in {paths!r}; {told}")
        sets[name] = found
        weights |= {name: float(weight)} if weight else {}
    return sets, weights


def _templates(asked: Config) -> questions.Templates:
    """The questions of `data`, or of one of its tasks: a table, and what the config changes of it."""
    return questions.templates(asked.templates, asked.get("questions"))


def _text(config: Config) -> TextTokenizer:
    return TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)


def _questions(config: Config, image_tokens: int) -> ScorerTokenizer:
    return ScorerTokenizer(
        networks.resolve(config.data.scorer_tokenizer), image_tokens=image_tokens, length=config.data.question_length
    )


_OF_STAGE: Mapping[str, Callable[[Config, Modules], grain.MapDataset]] = {
    "autoencoder": _images,
    "base": _images_with_text,
    "scorer": _scorer_pairs,
    "warmup": _images_with_text,
    "npedit": _edits,
    "supervised": _easyvqa_pairs,
}
