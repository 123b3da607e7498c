"""Every config file: it loads, names a stage, and its networks have shapes that fit one another and its step."""

import functools
import importlib.util
import pathlib
import re
import sys

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from npedit_jax.compilation import programs
from npedit_jax.data import questions
from npedit_jax.training import networks, previews, stages, state
from npedit_jax.weights import published

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))
EDITS = [path for path in FILES if path.stem.startswith(("npedit", "customization", "warmup"))]
# Their step is that of zimage/npedit.py but for the scorer, and for the data.
LIKE_ANOTHER = ("npedit_llava", "customization")
DECODED = 8  # pixels per latent
name_of = lambda path: str(path.relative_to(CONFIGS))  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def repository_on_the_path():
    """Configs import one another from the repository's root, where `python -m npedit_jax.train` runs."""
    sys.path.insert(0, str(CONFIGS.parent))
    yield
    sys.path.remove(str(CONFIGS.parent))


def _load(path: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config configs/{path.relative_to(CONFIGS)}" in module.__doc__, "the docstring gives the launch command"
    assert not re.search(r"records=\w+://", module.__doc__), "shards are opened by path"
    return module.get_config()


def _known(spec: ConfigDict) -> bool:
    """Whether the network's shape can be told here: from its files, or because its checkpoint is a published one."""
    directory = spec.directory
    return (
        not directory
        or (networks.resolve(directory) / "config.json").exists()
        or published.architecture(directory) is not None
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_config_trains_networks_that_it_has(path):
    config = _load(path)
    stages.check(config)
    assert set(config.optimizer) <= set(config.networks)
    assert config.batch_size % config.cpu_devices == 0
    for name, item in stages.adapted(config).items():
        assert name in config.optimizer and item.base not in config.optimizer
        assert config.networks[name].directory == config.networks[item.base].directory


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_networks_of_a_config_fit_one_another(path):
    config = _load(path)
    modules = {name: networks.module_of(spec) for name, spec in config.networks.items() if _known(spec)}
    for name, module in modules.items():
        assert jax.tree.leaves(networks.shapes(config.networks[name].kind, module)), name
    denoisers = [module for name, module in modules.items() if config.networks[name].kind == "zimage"]
    for denoiser in denoisers:
        assert denoiser.channels == modules["autoencoder"].latent_channels
        if "text_encoder" in modules:
            assert denoiser.text_width == modules["text_encoder"].decoder.width


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LIKE_ANOTHER else []) for path in EDITS],
    ids=[name_of(path) for path in EDITS],
)
def test_step_of_a_config_has_shapes(path):
    """The whole step, traced on shapes alone: the state keeps its own, and no metric is more than a number."""
    config = _load(path)
    if not all(_known(spec) for spec in config.networks.values()):
        pytest.skip("its weights are not there yet")
    start, frozen = _assert_step_has_shapes(config)
    for name, item in stages.adapted(config).items():
        sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (start.params[name], frozen[item.base])]
        assert sizes[0] <= 0.05 * sizes[1]
        assert {str(x.dtype) for x in jax.tree.leaves(frozen[item.base])} <= {"bfloat16", "float32"}


def _assert_step_has_shapes(config: ConfigDict) -> tuple[state.TrainState, dict]:
    """Traces the step; returns the state that it starts from and the frozen parameters, shapes all."""
    made = stages.abstract_networks(config)
    rules = stages.rules(config)
    averaged = ("student",)
    start = jax.eval_shape(
        functools.partial(state.create, rules=rules, averaged=averaged), {name: made[name].params for name in rules}
    )
    frozen = {name: network.params for name, network in made.items() if name not in rules}
    sides = config.data.buckets if "buckets" in config.data else [(64, 64)]
    with config.unlocked():
        config.batch_size = 2
    modules, batch = {name: network.module for name, network in made.items()}, programs.batch_shapes(config, sides[-1])
    end, metrics = jax.eval_shape(stages.step(config, modules), start, frozen, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), end) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    assert {"loss"} <= metrics.keys() and all(x.shape == () for x in metrics.values())
    # What the loop reads after a step, and draws.
    assert {f"skipped/{name}" for name, many in stages.updates(config).items() if many} <= metrics.keys()
    if config.stage == "npedit":
        batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    draw = previews.function(config, modules, stages.adapted(config))
    for row in jax.eval_shape(draw, frozen | start.ema, batch, jax.random.key(0)):
        assert row.shape == batch["reference"].shape
    return start, frozen


@pytest.mark.parametrize("path", [path for path in EDITS if path.parent.name == "zimage"], ids=name_of)
def test_full_size_configs_are_of_the_sizes_of_the_originals(path):
    """Parameters of each part, and one frozen copy of the denoiser where adapters are trained."""
    config = _load(path)
    made = stages.abstract_networks(config)
    size = {name: sum(x.size for x in jax.tree.leaves(network.params)) for name, network in made.items()}
    bits = {name: {x.dtype.itemsize * 8 for x in jax.tree.leaves(network.params)} for name, network in made.items()}
    assert size["autoencoder"] == 83_819_683 and bits["autoencoder"] == {32}
    whole = [name for name in made if size[name] == 6_154_908_736]
    if path.stem.endswith("_lora"):
        assert len(whole) == 1 and bits[whole[0]] == {16} and whole[0] not in config.optimizer
    else:
        assert "student" in whole and all(bits[name] == ({32} if name in config.optimizer else {16}) for name in whole)
    if config.stage == "npedit":
        assert sum(config.data.options.edit_weights.values()) == pytest.approx(1.0)
        assert set(config.data.options.edit_weights) <= set(config.data.options.guidance)
        tasks = config.data.tasks if "tasks" in config.data else {"": config.data}
        assert all(task.templates in questions.TEMPLATES for task in tasks.values())
        assert set(tasks) - {""} <= set(questions.TASK_PREFIXES)


ABLATED = CONFIGS / "zimage" / "npedit.py"
ABLATIONS = re.findall(r"^  (\S.*?) +(--config\..*)$", ABLATED.read_text(), re.MULTILINE)
QUICK = ("no DMD",)  # the one whose step has other parts; a smaller scorer or another form of its loss repeats the rest


def _with_options(path: pathlib.Path, options: str) -> ConfigDict:
    """The config as the trainer gets it from its command line."""
    values, words = flags.FlagValues(), ["train", f"--config={path}", *options.split()]
    config = config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True, sys_argv=words)
    values(words)
    return config.value


def test_ablations_are_those_of_the_paper():
    names = {name for name, _ in ABLATIONS}
    assert {f"scorer of {size} B" for size in (1, 2, 8)} <= names and set(QUICK) <= names
    size = {}
    for name, options in ABLATIONS:
        config = _with_options(ABLATED, options)
        assert config.to_dict() != _load(ABLATED).to_dict(), name
        scorer = stages.abstract_networks(config, ["scorer"])["scorer"].params
        size[name] = sum(x.size for x in jax.tree.leaves(scorer["language"]))
        if name.startswith("scorer"):
            assert config.data.scorer_tokenizer == config.networks.scorer.directory
    assert size["scorer of 1 B"] < size["scorer of 2 B"] < size["scorer of 8 B"] < size["no DMD"] == 14_766_040_064
    with pytest.raises(AttributeError):
        _with_options(ABLATED, "--config.step.no_such_field=1")


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=n, marks=[] if n in QUICK else [pytest.mark.slow]) for n, o in ABLATIONS],
)
def test_step_of_an_ablation_has_shapes(options):
    _assert_step_has_shapes(_with_options(ABLATED, options))
