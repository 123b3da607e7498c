"""The stages of training, by name: which networks they train, on which data, with which step."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import ml_collections
import optax

from npedit_jax.data import easyvqa, pipeline, questions, scorer_pairs
from npedit_jax.data.batches import Feed
from npedit_jax.data.tokenize import ScorerTokenizer, TextTokenizer
from npedit_jax.training import edit_step, networks, optimizer, steps
from npedit_jax.training.networks import Network


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything the loop needs to run one stage.

    Attributes:
      networks: all of them, by name; those among `rules` are trained.
      rules: the optimizer of each trained network.
      averaged: trained networks of which an average is kept.
      step: pure function `(state, frozen, batch, rng) -> (state, metrics)`.
      dataset: batches as dictionaries of numpy arrays.
      inner_batches: batches have this leading axis before the batch axis; 0 for none.
    """

    networks: Mapping[str, Network]
    rules: Mapping[str, optax.GradientTransformation]
    averaged: tuple[str, ...]
    step: steps.Step
    dataset: grain.MapDataset
    inner_batches: int = 0

    def trained(self) -> dict[str, Any]:
        """Initial parameters of the trained networks."""
        return {name: self.networks[name].params for name in self.rules}

    def frozen(self) -> dict[str, Any]:
        """Parameters of all others."""
        return {name: network.params for name, network in self.networks.items() if name not in self.rules}


def build(config: ml_collections.ConfigDict) -> Stage:
    """Builds the stage that `config.stage` names.

    Raises:
      ValueError: unknown stage.
    """
    builders: Mapping[str, Callable[..., Stage]] = {
        "autoencoder": _autoencoder,
        "base": _base,
        "scorer": _scorer,
        "warmup": _warmup,
        "npedit": _npedit,
        "supervised": _supervised,
    }
    if config.stage not in builders:
        raise ValueError(f"unknown stage {config.stage!r}; choose one of {tuple(builders)}")
    rng, _ = jax.random.split(jax.random.key(config.seed))
    specs = config.networks
    made = {
        name: networks.create(specs[name], jax.random.fold_in(rng, number)) for number, name in enumerate(sorted(specs))
    }
    rules = {name: _rule(settings, config.steps) for name, settings in config.optimizer.items()}
    return builders[config.stage](config, made, rules)


def _rule(settings: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    options = settings.to_dict()
    rate = optimizer.schedule(
        options.pop("learning_rate"), options.pop("final_learning_rate"), options.pop("warmup_steps"), steps
    )
    return optimizer.build(options.pop("name"), learning_rate=rate, **options)


def _modules(made: Mapping[str, Network]) -> dict[str, Any]:
    return {name: network.module for name, network in made.items()}


def _feed(config: ml_collections.ConfigDict, inner_batches: int = 0) -> Feed:
    host = (jax.process_index(), jax.process_count())
    return Feed(config.seed, config.batch_size // host[1], host, inner_batches)


def _dataset(config: ml_collections.ConfigDict, feed: Feed, **extra: Any) -> grain.MapDataset:
    return pipeline.stage_dataset(config.stage, easyvqa.load("train"), feed, **config.data.options.to_dict(), **extra)


def _text(config: ml_collections.ConfigDict) -> TextTokenizer:
    return TextTokenizer(networks.resolve(config.data.text_tokenizer), config.data.text_length)


def _questions(config: ml_collections.ConfigDict, image_tokens: int) -> ScorerTokenizer:
    return ScorerTokenizer(
        networks.resolve(config.data.scorer_tokenizer), image_tokens=image_tokens, length=config.data.question_length
    )


def _autoencoder(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    step = steps.autoencoder_step(_modules(made), rules, **config.step.to_dict())
    return Stage(made, rules, tuple(rules), step, _dataset(config, _feed(config)))


def _base(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    step = steps.base_step(_modules(made), rules, **config.step.to_dict())
    return Stage(made, rules, tuple(rules), step, _dataset(config, _feed(config), text=_text(config)))


def _warmup(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    return _student_flow(config, made, rules, target="reference", text="caption")


def _supervised(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    return _student_flow(config, made, rules, target="target", text="instruction")


def _student_flow(
    config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules, *, target: str, text: str
) -> Stage:
    step = steps.student_flow_step(_modules(made), rules, target=target, text=text, **config.step.to_dict())
    return Stage(made, rules, tuple(rules), step, _dataset(config, _feed(config), text=_text(config)))


def _scorer(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    step = steps.scorer_step(_modules(made), rules, **config.step.to_dict())
    tokenizer = _questions(config, made["scorer"].module.image_tokens)
    templates, data = questions.TEMPLATES[config.data.templates], easyvqa.load("train")
    pairs = scorer_pairs.PairSource(data, templates, config.data.options.questions)
    dataset = pipeline.stage_dataset(
        config.stage,
        data,
        _feed(config),
        tokenizer=tokenizer,
        templates=templates,
        pairs=pairs,
        **config.data.options.to_dict(),
    )
    return Stage(made, rules, tuple(rules), step, dataset)


def _npedit(config: ml_collections.ConfigDict, made: Mapping[str, Network], rules: steps.Rules) -> Stage:
    inner = config.fake_updates + 1
    settings = edit_step.EditSettings(**config.step.to_dict())
    dataset = _dataset(
        config,
        _feed(config, inner),
        text=_text(config),
        scorer=_questions(config, made["scorer"].module.image_tokens),
        templates=questions.TEMPLATES[config.data.templates],
    )
    step = edit_step.outer_step(_modules(made), rules, settings)
    return Stage(made, rules, ("student",), step, dataset, inner)
