"""The stages of training, by name: which networks they train, on which data, with which step."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from npedit_jax import parallel
from npedit_jax.data.batches import Reading
from npedit_jax.models import lora
from npedit_jax.sampling import Modules
from npedit_jax.training import datasets, edit_step, fields, networks, optimizer, state, steps
from npedit_jax.training.edit_losses import EditSettings
from npedit_jax.training.networks import Network

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything the loop needs to run one stage.

    Attributes:
      networks: all of them, by name; those among `rules` are trained.
      rules: the optimizer of each trained network.
      averaged: trained networks of which an average is kept.
      mesh: the devices that the parameters are spread over.
      step: `(state, frozen, batch, rng) -> (state, metrics)`, compiled; it takes the state over.
      dataset: this host's share of each batch, as dictionaries of numpy arrays.
      reading: how a host reads them ahead.
      inner_batches: batches have this leading axis before the batch axis; 0 for none.
      adapted: networks of which only adapters are trained: adapters stand in the place of their parameters.
      offload: what lies in the hosts' memory between programs, see `offload`.
    """

    networks: Mapping[str, Network]
    rules: Mapping[str, optax.GradientTransformation]
    averaged: tuple[str, ...]
    mesh: Mesh
    step: steps.Step
    dataset: grain.MapDataset
    reading: Reading = Reading()
    inner_batches: int = 0
    adapted: Mapping[str, lora.Adapted] = dataclasses.field(default_factory=dict)
    offload: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Of all networks."""
        return {name: network.module for name, network in self.networks.items()}

    def start(self) -> state.TrainState:
        """The state at step 0, which takes the initial parameters over."""
        places = jax.tree.map(lambda x: x.sharding, self.shapes())
        return parallel.place(self._create, places, self._initial, donate=(0,))

    def shapes(self) -> state.TrainState:
        """The shape, type and place of each of the state's arrays."""
        found = jax.eval_shape(self._create, self._initial)
        places = state_shardings(self.mesh, found, self.offload)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), found, places)

    def drop_initial(self) -> None:
        """Frees the initial parameters, for a state that is read: both would not fit. There is no `start` after."""
        for array in jax.tree.leaves(self._initial):
            array.delete()

    @property
    def _initial(self) -> dict[str, Any]:
        return {name: self.networks[name].params for name in self.rules}

    def _create(self, params: dict[str, Any]) -> state.TrainState:
        return state.create(params, self.rules, self.averaged)

    def frozen(self) -> dict[str, Any]:
        """Parameters of all others, in the place where they lie during the run."""
        return {name: network.params for name, network in self.networks.items() if name not in self.rules}


def build(config: Config) -> Stage:
    """Builds the stage that `config.stage` names, with its weights and data.

    Raises:
      ValueError: unknown stage.
    """
    check(config)
    mesh = parallel.make_mesh(**config.mesh.to_dict())
    made = {
        name: _on_host(make()) if name in offload(config) else make() for name, make in _makers(config, mesh).items()
    }
    modules = {name: network.module for name, network in made.items()}
    return Stage(
        networks=made,
        rules=rules(config),
        averaged=averaged(config),
        mesh=mesh,
        step=compiled_step(config, {name: network.params for name, network in made.items()}, modules, mesh),
        dataset=datasets.build(config, modules),
        reading=Reading(**config.data.reading),
        inner_batches=datasets.inner_batches(config),
        adapted=adapted(config),
        offload=offload(config),
    )


def _on_host(network: Network) -> Network:
    """With its parameters in the hosts' memory, and nowhere else."""
    places = parallel.on_host(jax.tree.map(lambda x: x.sharding, network.params))
    return network._replace(params=jax.device_put(network.params, places))


def offload(config: Config) -> tuple[str, ...]:
    """What lies in the hosts' memory between programs, and is brought to the devices by those that use it.

    Names of frozen networks, or "optimizer" for the optimizer's state.

    Raises:
      ValueError: any other name.
    """
    names = tuple(config.offload)
    frozen = [name for name in config.networks if name not in config.optimizer]
    if unknown := [name for name in names if name not in ("optimizer", *frozen)]:
        raise ValueError(f"cannot offload {unknown}; choose among 'optimizer' and the frozen networks {frozen}")
    return names


def state_shardings(mesh: Mesh, start: state.TrainState, offload: Collection[str]) -> state.TrainState:
    """Where each array of a state lies between programs."""
    found = state.shardings(mesh, start)
    return found.replace(optimizer=parallel.on_host(found.optimizer)) if "optimizer" in offload else found


def frozen_shardings(mesh: Mesh, frozen: Mapping[str, Any], offload: Collection[str]) -> dict[str, Any]:
    """Where each frozen parameter lies between programs."""
    found = {name: parallel.parameter_shardings(mesh, tree) for name, tree in frozen.items()}
    return {name: parallel.on_host(tree) if name in offload else tree for name, tree in found.items()}


def averaged(config: Config) -> tuple[str, ...]:
    """Trained networks of which an average is kept."""
    return ("student",) if config.stage == "npedit" else tuple(config.optimizer)


def updates(config: Config) -> dict[str, int]:
    """How many updates each trained network gets in a step."""
    return {name: config.fake_updates if name == "fake_score" else 1 for name in config.optimizer}


def check(config: Config) -> None:
    """Raises ValueError where the config names no stage, or has other fields than its stage."""
    if (stage := config.get("stage")) not in STEPS:
        raise ValueError(f"unknown stage {stage!r}; choose one of {tuple(STEPS)}")
    fields.check(config)


def step(config: Config, modules: Modules) -> steps.Step:
    """The step of a config's stage, from modules alone: neither weights nor data are read."""
    return STEPS[config.stage](config, modules, rules(config))


def compiled_step(config: Config, params: Mapping[str, Any], modules: Modules, mesh: Mesh) -> steps.Step:
    """The step as `programs` that know where everything lies."""
    made = programs(config, params, modules, mesh)
    return edit_step.separate_steps(made, edit_settings(config)) if separate(config) else made["step"]


def step_functions(config: Config, modules: Modules) -> dict[str, steps.Step]:
    """What `programs` compiles: the whole step, or its parts."""
    return edit_step.parts(_updates(config, modules)) if separate(config) else {"step": step(config, modules)}


def programs(config: Config, params: Mapping[str, Any], modules: Modules, mesh: Mesh) -> dict[str, steps.Step]:
    """The compiled programs of a stage's step by name, each of which takes the state over: "step", or its parts.

    Args:
      params: of all networks by name, arrays or their shapes.
    """
    trained = {name: params[name] for name in config.optimizer}
    frozen = {name: tree for name, tree in params.items() if name not in trained}
    create = functools.partial(state.create, rules=rules(config), averaged=averaged(config))
    of_state = state_shardings(mesh, jax.eval_shape(create, trained), offload(config))
    of_frozen = frozen_shardings(mesh, frozen, offload(config))
    functions = step_functions(config, modules)
    return {name: steps.compile_step(function, of_state, of_frozen) for name, function in functions.items()}


def rules(config: Config) -> dict[str, optax.GradientTransformation]:
    """The optimizer of each trained network."""
    return {name: _rule(config.optimizer[name], config.steps, many) for name, many in updates(config).items()}


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


def expected_runs(config: Config) -> dict[str, float]:
    """How often a step runs each of its `programs`, on average over the draws of the unroll's length."""
    if not separate(config):
        return {"step": 1.0}
    lengths, times = edit_settings(config).lengths, len(config.step.times)
    shares = {1: 1.0} if lengths == (1,) else {1: 1 / times, 2: 1 - 1 / times}
    updates = {"fake_score": config.fake_updates, "student": 1}
    return {f"{name}/{n}": count * share for name, count in updates.items() for n, share in shares.items()}


def whole(config: Config, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Trained parameters as a checkpoint keeps them, with adapters merged into their base's weights, which are read.

    What was merged is float32, whatever the base's type is: rounded to bfloat16, small steps of the adapters are gone.
    """
    merged = {}
    for name, item in adapted(config).items():
        if name in trained:
            base = jax.tree.map(lambda x: x.astype(jnp.float32), _makers(config, None)[item.base]().params)
            merged[name] = lora.merge(base, trained[name], item.alpha)
    return {**trained, **merged}


def _makers(config: Config, mesh: Mesh | None) -> dict[str, Callable[[], Network]]:
    """What makes each network, so that one can be made without the others."""
    rng, _ = jax.random.split(jax.random.key(config.seed))
    specs, found = config.networks, {}
    for number, name in enumerate(sorted(specs)):
        spec, key = specs[name], jax.random.fold_in(rng, number)
        if name in adapted(config):
            options = {option: config.lora[option] for option in ("rank", "alpha", "targets")}
            options |= {"base": specs[config.lora.base[name]], "start": config.lora.start[name]}
            found[name] = functools.partial(networks.adapt, spec, rng=key, mesh=mesh, **options)
        else:
            found[name] = functools.partial(networks.create, spec, key, mesh=mesh)
    return found


def _rule(settings: Config, steps: int, updates: int) -> optax.GradientTransformation:
    """The optimizer of a network, whose schedule is told in steps and counts the network's own updates."""

    def build(*, learning_rate: float, final_learning_rate: float, warmup_steps: int, **options: Any) -> Any:
        rate = optimizer.schedule(learning_rate, final_learning_rate, updates * warmup_steps, updates * steps)
        return _call("optimizer", optimizer.build, learning_rate=rate, **options)

    return _call("optimizer", build, **settings.to_dict())


def _call(part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a function with the fields of a part of the config; ValueError where it does not take just these."""
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"config.{part}: {error}") from None
    return function(*arguments, **options)


def _plain_step(make: Callable[..., steps.Step], config: Config, modules: Modules, rules: steps.Rules) -> steps.Step:
    return _call("step", make, modules, rules, **config.step.to_dict())


def _student_flow_step(config: Config, modules: Modules, rules: steps.Rules, *, target: str, text: str) -> steps.Step:
    options = dict(target=target, text=text, adapted=adapted(config).get("student"), **config.step.to_dict())
    return _call("step", steps.student_flow_step, modules, rules, **options)


def _npedit_step(config: Config, modules: Modules, rules: steps.Rules) -> steps.Step:
    del rules
    return edit_step.outer_step(_updates(config, modules))


def _updates(config: Config, modules: Modules) -> edit_step.Updates:
    return edit_step.Updates(modules, rules(config), edit_settings(config), adapted(config))


def edit_settings(config: Config) -> EditSettings:
    """The numbers of the edit stage."""
    return _call("step", EditSettings, **config.step.to_dict())


def separate(config: Config) -> bool:
    """Whether each update of the step is a program of its own."""
    return config.stage == "npedit" and config.separate_steps


STEPS: Mapping[str, Callable[[Config, Modules, steps.Rules], steps.Step]] = {
    "autoencoder": functools.partial(_plain_step, steps.autoencoder_step),
    "base": functools.partial(_plain_step, steps.base_step),
    "scorer": functools.partial(_plain_step, steps.scorer_step),
    "warmup": functools.partial(_student_flow_step, target="reference", text="caption"),
    "npedit": _npedit_step,
    "supervised": functools.partial(_student_flow_step, target="target", text="instruction"),
}
