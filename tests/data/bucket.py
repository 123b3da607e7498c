"""A folder that stands in for what `epath` opens gs:// addresses with."""

import os
import pathlib

import pytest
from etils.epath import backend, gpath


class _Bucket:
    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __getattr__(self, name):
        place = lambda path: os.fspath(path).replace("gs://", f"{self._folder}/")  # noqa: E731
        return lambda *paths, **options: getattr(backend.os_backend, name)(*map(place, paths), **options)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    """From now on gs://NAME is a folder of this one."""
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", _Bucket(folder))
