"""The stages of training, by name: which networks they train, on which data, with which step."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import grain
import jax
import ml_collections
import optax

from npedit_jax.data import easyvqa, pipeline, questions, scorer_pairs
from npedit_jax.data.batches import Feed, Reading
from npedit_jax.data.easyvqa_source import EasyVQASource
from npedit_jax.data.records import Records
from npedit_jax.data.sources import RecordSource, Source
from npedit_jax.data.tokenize import ScorerTokenizer, TextTokenizer
from npedit_jax.models import lora
from npedit_jax.training import edit_step, networks, optimizer, steps
from npedit_jax.training.edit_losses import EditSettings
from npedit_jax.training.networks import Network

Config = ml_collections.ConfigDict
Modules = Mapping[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything the loop needs to run one stage.

    Attributes:
      networks: all of them, by name; those among `rules` are trained.
      rules: the optimizer of each trained network.
      averaged: trained networks of which an average is kept.
      step: pure function `(state, frozen, batch, rng) -> (state, metrics)`.
      dataset: batches as dictionaries of numpy arrays.
      reading: how a host reads them ahead.
      inner_batches: batches have this leading axis before the batch axis; 0 for none.
      adapted: networks of which only adapters are trained: adapters stand in the place of their parameters.
      compiled: the step compiles its own programs and is not to be compiled as a whole.
    """

    networks: Mapping[str, Network]
    rules: Mapping[str, optax.GradientTransformation]
    averaged: tuple[str, ...]
    step: steps.Step
    dataset: grain.MapDataset
    reading: Reading = Reading()
    inner_batches: int = 0
    adapted: Mapping[str, lora.Adapted] = dataclasses.field(default_factory=dict)
    compiled: bool = False

    def trained(self) -> dict[str, Any]:
        """Initial parameters of the trained networks."""
        return {name: self.networks[name].params for name in self.rules}

    def frozen(self) -> dict[str, Any]:
        """Parameters of all others."""
        return {name: network.params for name, network in self.networks.items() if name not in self.rules}

    def program(self) -> steps.Step:
        """The step as compiled programs, which take the state over."""
        return self.step if self.compiled else jax.jit(self.step, donate_argnums=0)

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of all networks by name, with those of adapted ones whole: base and adapters merged."""
        whole = {name: lora.merge(params[a.base], params[name], a.alpha) for name, a in self.adapted.items()}
        return {**params, **whole}


def build(config: Config) -> Stage:
    """Builds the stage that `config.stage` names, with its weights and data.

    Raises:
      ValueError: unknown stage.
    """
    check(config)
    made = {name: make() for name, make in _makers(config).items()}
    modules = {name: network.module for name, network in made.items()}
    edits = config.stage == "npedit"
    return Stage(
        networks=made,
        rules=rules(config),
        averaged=("student",) if edits else tuple(config.optimizer),
        step=step(config, modules),
        dataset=DATASETS[config.stage](config, modules),
        reading=Reading(**config.data.reading) if "reading" in config.data else Reading(),
        inner_batches=config.fake_updates + 1 if edits else 0,
        adapted=adapted(config),
        compiled=edits and _separate(config),
    )


def check(config: Config) -> None:
    """Raises ValueError where the config names no stage."""
    if config.stage not in STEPS:
        raise ValueError(f"unknown stage {config.stage!r}; choose one of {tuple(STEPS)}")


def step(config: Config, modules: Modules) -> steps.Step:
    """The step of a config's stage, from modules alone: neither weights nor data are read."""
    return STEPS[config.stage](config, modules, rules(config))


def rules(config: Config) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each trained network."""
    return {name: _rule(settings, config.steps) for name, settings in config.optimizer.items()}


def adapted(config: Config) -> dict[str, lora.Adapted]:
    """Networks of which only adapters are trained, from the config's `lora` where it has one."""
    if "lora" not in config:
        return {}
    return {name: lora.Adapted(base, config.lora.alpha) for name, base in config.lora.base.items()}


def abstract_networks(config: Config, names: Collection[str] | None = None) -> dict[str, Network]:
    """Networks with the shapes and types of their parameters (or adapters) in the parameters' place; by default all."""
    made = {}
    for name in config.networks if names is None else names:
        spec = config.networks[name]
        module = networks.module_of(spec)
        params = networks.shapes(spec.kind, module)
        if name in adapted(config):
            create = functools.partial(lora.create, rank=config.lora.rank, patterns=config.lora.targets)
            params = jax.eval_shape(create, jax.random.key(0), params)
        made[name] = Network(module, params)
    return made


def whole(config: Config, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Trained parameters as a checkpoint keeps them, with adapters merged into their base's weights, which are read."""
    merged = {
        name: lora.merge(_makers(config)[item.base]().params, trained[name], item.alpha)
        for name, item in adapted(config).items()
        if name in trained
    }
    return {**trained, **merged}


def _makers(config: Config) -> dict[str, Callable[[], Network]]:
    """What makes each network, so that one can be made without the others."""
    rng, _ = jax.random.split(jax.random.key(config.seed))
    specs, found = config.networks, {}
    for number, name in enumerate(sorted(specs)):
        spec, key = specs[name], jax.random.fold_in(rng, number)
        if name in adapted(config):
            options = {option: config.lora[option] for option in ("rank", "alpha", "targets")}
            options |= {"base": specs[config.lora.base[name]], "start": config.lora.start[name]}
            found[name] = functools.partial(networks.adapt, spec, rng=key, **options)
        else:
            # Weights are stored as the module's parameters are typed: frozen ones in bfloat16 on an accelerator.
            dtype = spec.options.get("param_dtype", "float32")
            found[name] = functools.partial(networks.create, spec, key, dtype=dtype)
    return found


def _rule(settings: Config, steps: int) -> optax.GradientTransformation:
    options = settings.to_dict()
    rate = optimizer.schedule(
        options.pop("learning_rate"), options.pop("final_learning_rate"), options.pop("warmup_steps"), steps
    )
    return optimizer.build(options.pop("name"), learning_rate=rate, **options)


def _plain_step(make: Callable[..., steps.Step], config: Config, modules: Modules, rules: steps.Rules) -> steps.Step:
    return make(modules, rules, **config.step.to_dict())


def _student_flow_step(config: Config, modules: Modules, rules: steps.Rules, *, target: str, text: str) -> steps.Step:
    options = dict(target=target, text=text, adapted=adapted(config).get("student"), **config.step.to_dict())
    return steps.student_flow_step(modules, rules, **options)


def _npedit_step(config: Config, modules: Modules, rules: steps.Rules) -> steps.Step:
    updates = edit_step.Updates(modules, rules, EditSettings(**config.step.to_dict()), adapted(config))
    return edit_step.separate_steps(updates) if _separate(config) else edit_step.outer_step(updates)


def _separate(config: Config) -> bool:
    return "separate_steps" in config and config.separate_steps


STEPS: Mapping[str, Callable[[Config, Modules, steps.Rules], steps.Step]] = {
    "autoencoder": functools.partial(_plain_step, steps.autoencoder_step),
    "base": functools.partial(_plain_step, steps.base_step),
    "scorer": functools.partial(_plain_step, steps.scorer_step),
    "warmup": functools.partial(_student_flow_step, target="reference", text="caption"),
    "npedit": _npedit_step,
    "supervised": functools.partial(_student_flow_step, target="target", text="instruction"),
}


def _feed(config: Config) -> Feed:
    host = (jax.process_index(), jax.process_count())
    inner = config.fake_updates + 1 if config.stage == "npedit" else 0
    return Feed(config.seed, config.batch_size // host[1], host, inner)


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
    templates, data = questions.TEMPLATES[config.data.templates], easyvqa.load("train")
    pairs = scorer_pairs.PairSource(data, templates, config.data.options.questions)
    tokenizer = _questions(config, modules["scorer"].image_tokens)
    options = dict(tokenizer=tokenizer, templates=templates, pairs=pairs, **config.data.options.to_dict())
    return pipeline.scorer(data, _feed(config), **options)


def _edits(config: Config, modules: Modules) -> grain.MapDataset:
    source, options = _source(config)
    weights = options.pop("edit_weights")
    tasks = {"": pipeline.Task(source, weights, questions.TEMPLATES[config.data.templates])}
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
        questions.TEMPLATES[spec.templates],
        questions.TASK_PREFIXES[name] if config.data.task_prefix else "",
        spec.weight,
    )


def _source(config: Config, records: str = "") -> tuple[Source, dict[str, Any]]:
    """Where samples come from, and the options that are left for the stage."""
    options = config.data.options.to_dict()
    fraction = options.pop("fraction", 1.0)
    if "records" not in config.data:
        return EasyVQASource(easyvqa.load("train").fraction(fraction)), options
    sets, weights = _sets(records or config.data.records)
    flip = options.pop("flip", 0.0)
    return RecordSource(sets, config.data.buckets, weights=weights, fraction=fraction, flip=flip), options


def _sets(paths: str) -> tuple[dict[str, Records], dict[str, float]]:
    """Sets of records by the name of their directory, and their weights: "DIR" or "DIR=WEIGHT,DIR=WEIGHT"."""
    sets, weights = {}, {}
    for path in paths.split(","):
        directory, _, weight = path.partition("=")
        name = directory.rstrip("/").rsplit("/", 1)[-1]
        if name in sets:
            raise ValueError(f"two sets of records are called {name!r} in {paths!r}; rename one directory")
        sets[name] = Records(directory)
        weights |= {name: float(weight)} if weight else {}
    return sets, weights


def _text(config: Config) -> TextTokenizer:
    return TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)


def _questions(config: Config, image_tokens: int) -> ScorerTokenizer:
    return ScorerTokenizer(
        networks.resolve(config.data.scorer_tokenizer), image_tokens=image_tokens, length=config.data.question_length
    )


DATASETS: Mapping[str, Callable[[Config, Modules], grain.MapDataset]] = {
    "autoencoder": _images,
    "base": _images_with_text,
    "scorer": _scorer_pairs,
    "warmup": _images_with_text,
    "npedit": _edits,
    "supervised": _easyvqa_pairs,
}
