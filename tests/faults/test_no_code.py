"""Loading runs no code: nothing in the package calls what could, and files made to run some are refused."""

import ast
import io
import json
import pathlib
import pickle
import zipfile

import pytest
from etils import epath
from PIL import EpsImagePlugin, Image

import npedit_jax
from npedit_jax import Editor, pictures, weights
from npedit_jax.data import records
from npedit_jax.training import workdirs
from tests.data import record_sets
from tests.faults.command import ROOT

PACKAGE = pathlib.Path(npedit_jax.__file__).parent
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("numpy", "load"), ("np", "load")}


def _faults(tree: ast.AST) -> list[str]:
    """What the source does that could run what a file holds."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"imports {name.name}" for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(f"imports from {node.module}")
        elif isinstance(node, ast.Call):
            options = {option.arg: option.value for option in node.keywords}
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.append(f"line {node.lineno} calls {node.func.id}")
            if "trust_remote_code" in options or getattr(options.get("allow_pickle"), "value", False):
                found.append(f"line {node.lineno} trusts a file")
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                name = (node.func.value.id, node.func.attr)
                if name == ("Image", "open") and "formats" not in options:
                    found.append(f"line {node.lineno} opens pictures that Pillow reads by running programs")
                safe = name[0] != "torch" or getattr(options.get("weights_only"), "value", False)
                if name in LOADERS and not safe:
                    found.append(f"line {node.lineno} calls {'.'.join(name)}")
    return found


def test_nothing_in_the_package_can_run_what_it_loads():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    faults = {str(file.relative_to(PACKAGE)): _faults(ast.parse(file.read_text())) for file in files}
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from yaml import load", "eval(x)", "f(trust_remote_code=True)", "np.load(f, allow_pickle=True)",
     "torch.load(f)", "Image.open(f)"],
)  # fmt: skip
def test_the_search_finds_each_of_them(source):
    assert _faults(ast.parse(source))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (pathlib.Path.touch, (self.mark,))


@pytest.fixture
def payload(tmp_path):
    mark = tmp_path / "executed"
    data = pickle.dumps(Payload(mark))
    pickle.loads(data)
    assert mark.exists(), "the payload must work for the test to mean anything"
    mark.unlink()
    yield data
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors"])
def test_pickled_weights_are_refused(payload, tmp_path, name):
    (tmp_path / "w").mkdir()
    config = {"_class_name": "AutoencoderKL", "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    (tmp_path / "w" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "w" / name).write_bytes(payload)
    with pytest.raises((ValueError, FileNotFoundError)):
        weights.load("autoencoder", epath.Path(tmp_path / "w"))


def test_run_whose_config_is_no_json_is_refused(payload, tmp_path):
    (tmp_path / "config.json").write_bytes(payload)
    with pytest.raises(workdirs.WorkdirError, match="damaged"):
        Editor.from_checkpoint(tmp_path)
    text = "!!python/object/apply:os.system ['touch executed']"
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(workdirs.WorkdirError, match="damaged"):
        Editor.from_checkpoint(tmp_path)


def test_pickle_as_a_picture_is_refused(payload):
    with pytest.raises(ValueError, match="no known format"):
        pictures.decode(payload)


def test_picture_that_is_a_program_is_refused(monkeypatch):
    """PostScript, which Pillow has Ghostscript run."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="EPS")
    with pytest.raises(ValueError, match="no known format"):
        pictures.decode(file.getvalue())
    assert not started


def test_pickled_index_of_records_is_refused(payload, tmp_path):
    """An array of objects in an .npz is a pickle."""
    record_sets.write(tmp_path / "set", record_sets.photograph_records(1))
    array = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "set" / records.INDEX, "w") as archive:
        archive.writestr("rows.npy", array + payload)
    with pytest.raises(ValueError, match="allow_pickle"):
        records.Records(tmp_path / "set")


def test_readme_says_that_config_files_are_executed():
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "Config files are Python and are executed" in text
