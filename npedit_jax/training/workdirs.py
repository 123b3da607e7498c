"""A run's working directory: its resolved config, and the refusal to mix two runs."""

import contextlib
import fnmatch
import json
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath

from npedit_jax import atomic

# Fields that may differ from one start of a run to the next: they change how it runs, what comes out by rounding only.
FREE_FIELDS = (
    "mesh.*",
    "offload",
    "data.reading.*",
    "checkpoint.*",
    "guard.*",
    "log.*",
    "cpu_devices",
    "networks.*.options.remat",
    "networks.*.options.implementation",
)
LOCK, LEASE = ".lock", ".lease"  # what holds the directory for one run, see `workdir_lock`


class WorkdirError(ValueError):
    """The working directory holds another run."""


class WorkdirUnavailable(WorkdirError):
    """The working directory is another run's for now, or out of reach: to be tried again."""


def open_run(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> None:
    """Creates the directory with `config.json`, or checks that it holds the same experiment; raises as `check`.

    Values that may change from start to start, and have, are told in the log.
    """
    changed = check(workdir, config)
    workdir = epath.Path(workdir)
    if jax.process_index() == 0:
        for line in changed:
            logging.warning("changed since the run began: %s", line)
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(workdir / "config.json", json.dumps(plain(config), indent=2) + "\n")


def check(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> list[str]:
    """Checks that a run of this config can begin or go on in the directory; writes nothing.

    Returns:
      A line for each value that has changed, among those that may.

    Raises:
      WorkdirError: the directory holds a run with other values, which are named, or files but no run.
    """
    workdir = epath.Path(workdir)
    if workdir.is_file():
        raise WorkdirError(f"{workdir} is a file; give --workdir a directory, or the path of a new one")
    path, new = workdir / "config.json", plain(config)
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise WorkdirError(f"{path} is damaged ({error}); take another --workdir, or mend it") from error
        if not isinstance(old, dict):
            raise WorkdirError(f"{path} holds no config but a {type(old).__name__}; take another --workdir, or mend it")
        if old.get("stage") != new.get("stage"):  # nearly all else differs then too
            raise WorkdirError(
                f"{workdir} holds a run of stage {old.get('stage')!r}, and this is one of {new.get('stage')!r}; take "
                "another --workdir"
            )
        different = differences(old, new)
        binding = [line for name, line in different if not any(fnmatch.fnmatch(name, free) for free in FREE_FIELDS)]
        if binding:
            raise WorkdirError(
                f"{workdir} holds a run with another config: {'; '.join(binding)}. "
                "Take another --workdir, or these values."
            )
        return [line for _, line in different]
    empty = (LOCK, LEASE, atomic.partial_name(path.name))  # the last of a run killed before it began
    if workdir.exists() and any(file.name not in empty for file in workdir.iterdir()):
        raise WorkdirError(f"{workdir} is not empty and holds no run (no config.json); take another --workdir")
    return []


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The resolved config of a run.

    Raises:
      WorkdirError: the directory holds no run, or one whose config.json is damaged.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise WorkdirError(f"{workdir} is no run: it has no config.json; give the --workdir of a training run")
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WorkdirError(f"{workdir} is no run: its config.json is damaged ({error})") from error


@contextlib.contextmanager
def reading(workdir: epath.PathLike) -> Iterator[ml_collections.ConfigDict]:
    """The resolved config of a run, to use inside: what it lacks there, or has of another type, is told as its damage.

    Raises:
      WorkdirError: as `read_config`, or that.
    """
    config = read_config(workdir)
    try:
        yield config
    except (AttributeError, KeyError, TypeError) as error:
        raise WorkdirError(
            f"{workdir} cannot be used: its config.json is damaged, or of another version ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from error


def plain(config: Any) -> Any:
    """A config as JSON holds it: dictionaries, lists, numbers, strings."""
    return json.loads(config.to_json())


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, str]]:
    """Fields whose values differ, each with a line that shows both."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if old == new else [(name, f"{name} is {old!r} there and {new!r} here")]
