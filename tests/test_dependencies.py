"""Which part of the package may use which: what docs/change.md says of it."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "npedit_jax"
# The command that shows batches reads a config as training does.
ALLOWED = {"data": {"data", "atomic"}, "objectives": {"objectives"}, "models": {"models", "parallel", "flops"}}
COMMANDS = {"data/inspect.py": {"training"}}


def imported(path: pathlib.Path) -> set[str]:
    """The parts of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("npedit_jax.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_uses_what_lies_below_it_alone(part):
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        name = str(path.relative_to(PACKAGE))
        assert imported(path) <= ALLOWED[part] | COMMANDS.get(name, set()), name


def test_no_command_imports_pytorch_before_it_needs_it():
    commands = "convert data.inspect data.instructions data.prepare data.select demo edit evaluate export"
    imports = "; ".join(f"import npedit_jax.{command}" for command in commands.split())
    heavy = "{'tensorboardX', 'tensorflow', 'torch', 'transformers'}"
    ran = subprocess.run(
        [sys.executable, "-c", f"{imports}; import sys; print({heavy} & set(sys.modules) or 'none')"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "none"
