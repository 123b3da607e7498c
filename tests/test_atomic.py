"""Files and directories that appear whole or not at all."""

import pytest

from npedit_jax import atomic


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, before):
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    with pytest.raises(OSError, match="full"), atomic.file(path) as partial:
        partial.write_text("half of the n")
        assert (path.read_text() if path.exists() else None) == before
        raise OSError("the disk is full")
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])
    atomic.write_text(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_what_a_killed_writer_left_behind_is_no_obstacle(tmp_path):
    for make in (atomic.file, atomic.directory):
        left_behind = make(tmp_path / "result")
        left_behind.__enter__()  # and never left, as by a kill
    (tmp_path / ".result.tmp").write_text("half")
    atomic.write_text(tmp_path / "result", "whole")
    assert (tmp_path / "result").read_text() == "whole" and not (tmp_path / ".result.tmp").exists()
    (tmp_path / "result").unlink()
    with atomic.directory(tmp_path / "result") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "result" / "a").read_text() == "1"


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_appears_with_all_of_its_files(tmp_path, there):
    path = tmp_path / "runs" / "exported"
    if there:
        path.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), atomic.directory(path) as partial:
        (partial / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not any(path.parent.iterdir()) or (there and [*path.parent.rglob("*")] == [path])
    with atomic.directory(path) as partial:
        (partial / "config.json").write_text("{}")
        assert not path.exists() or not any(path.iterdir())
    assert [*path.parent.rglob("*")] == [path, path / "config.json"]


def test_a_directory_with_files_in_it_is_kept(tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "mine").write_text("mine")
    with pytest.raises((OSError, ValueError), match="empty"), atomic.directory(tmp_path / "result") as partial:
        (partial / "a").write_text("1")
    assert [*tmp_path.rglob("*")] == [tmp_path / "result", tmp_path / "result" / "mine"]
