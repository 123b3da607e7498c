"""What commands tell in one line, and what they do not take for the user's to mend."""

import jax
import pytest

from npedit_jax import commands
from npedit_jax.training.faults import RunFault


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("two\n lines"), "two lines"),
        (FileNotFoundError(2, "No such file", "a.png"), "[Errno 2] No such file: 'a.png'"),
        (RunFault("the disk is full"), "the disk is full"),
        (ImportError("Please install gcsfs to access Google Storage"), "npedit_jax[gcs]'"),
        (ModuleNotFoundError("No module named 'gradio'"), "No module named 'gradio'; pip install 'npedit_jax[demo]'"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "a device has too little memory: RESOURCE_"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_status(error, told):
    with pytest.raises(SystemExit) as ended, commands.told("demo", extra="demo"):
        raise error
    assert ended.value.code.startswith("demo: ") and told in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize(
    "error",
    [ImportError("cannot import name 'x'"), jax.errors.JaxRuntimeError("INTERNAL: ?"), TypeError("x"), KeyError("x")],
)
def test_a_fault_of_the_program_stays_one(error):
    with pytest.raises(type(error)), commands.told("edit"):
        raise error
