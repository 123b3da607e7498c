"""The ablations' bookkeeping: which runs are left, what their figures belong to, and the page made from them."""

import json

import pytest

from benchmarks import easyvqa_ablations as ablations

MADE_WITH = {"steps": 3, "weights": "0123"}


def _summary(done, error=1.0):
    return {edit: {"done_kept": done, "kept_error": error} for edit in ablations.EDITS}


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """The script writes here, and its runs only note what they were asked for."""
    for name, file in {"FIGURES": "figures.json", "PAGE": "page.md", "PLOT": "plot.png"}.items():
        monkeypatch.setattr(ablations, name, tmp_path / file)
    begun = []

    def train_and_score(name, seed, steps, output):
        begun.append((name, seed))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return _summary(10.0 * len(begun))

    monkeypatch.setattr(ablations, "train_and_score", train_and_score)
    monkeypatch.setattr("sys.argv", ["easyvqa_ablations.py", "--rows", "full,one_step", "--steps", "3"])
    return tmp_path, begun


def test_goes_on_with_the_runs_that_are_left(sandbox, capsys):
    folder, begun = sandbox
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    ablations.main()
    assert "| full method | 3 |" in (folder / "page.md").read_text()
    assert begun == [("full", 0), ("one_step", 0), ("full", 1), ("full", 1), ("full", 2)]
    kept = json.loads((folder / "figures.json").read_text())["runs"]
    assert {name: list(runs) for name, runs in kept.items()} == {"full": ["0", "1", "2"], "one_step": ["0"]}
    lines = capsys.readouterr().out.splitlines()
    assert "| full method | 3 | 33.3 (10.0 to 50.0) |" in lines[2]
    assert "| one step unrolled instead of two | 1 | 20.0 |" in lines[3]


def test_refuses_to_mix_figures_of_other_weights_or_updates(sandbox, capsys):
    folder, begun = sandbox
    ablations.Figures(folder / "figures.json", MADE_WITH).add("full", 0, _summary(50.0))
    with pytest.raises(SystemExit) as ended:
        ablations.main()
    assert ended.value.code == 2
    assert "'weights': '0123'" in capsys.readouterr().err
    assert not begun


def test_weights_of_other_content_have_another_digest(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"one")
    before = ablations.digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert ablations.digest(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"two")
    assert ablations.digest(tmp_path) != before


def test_page_shows_the_committed_figures():
    """Of the weights and the config that are here."""
    made_with = json.loads(ablations.FIGURES.read_text())["made_with"]
    expected = {"weights": ablations.digest(ablations.WEIGHTS), "config": ablations.config_digest()}
    assert made_with == expected | {"steps": made_with["steps"]}
    rows = ablations.Figures(ablations.FIGURES, made_with).rows()
    assert f"\n{ablations.table(rows)}\n" in ablations.PAGE.read_text()


def test_page_is_begun_where_there_is_none(sandbox):
    folder, _ = sandbox
    ablations.write({"full": [_summary(90.0)]})
    assert "| full method | 1 | 90.0 |" in (folder / "page.md").read_text()


def test_page_keeps_what_is_written_around_the_table(sandbox):
    folder, _ = sandbox
    begin, end = "<!-- table: benchmarks/easyvqa_ablations.py --write -->", "<!-- end of the table -->"
    (folder / "page.md").write_text(f"# Title\n\n{begin}\nold\n{end}\n\nWhat it means.\n")
    ablations.write({"full": [_summary(90.0), _summary(70.0)], "supervised": [_summary(99.0)]})
    text = (folder / "page.md").read_text()
    assert text.startswith(f"# Title\n\n{begin}\n| | seeds |")
    assert text.endswith(f"{end}\n\nWhat it means.\n")
    assert "old" not in text
    assert "| full method | 2 | 80.0 (70.0 to 90.0) |" in text
    assert (folder / "plot.png").stat().st_size > 1000
