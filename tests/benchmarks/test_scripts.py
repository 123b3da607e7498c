"""Every benchmark is a command: it imports what is there, and says how it is called."""

import pathlib
import runpy

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_script_says_how_it_is_called(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.name}")
    assert f"benchmarks/{script.name}" in script.read_text().partition('"""\n')[0], "the docstring tells the command"
