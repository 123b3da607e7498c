"""How commands tell what their user can mend: in one line, and with an exit status other than 0."""

import contextlib
from collections.abc import Iterator

import jax

from npedit_jax.training.faults import RunFault


def advice(error: Exception, extra: str = "") -> str | None:
    """One line about an error that the user can mend; None for any other, which is a fault of the program.

    Args:
      extra: of the package, that has what the command may find missing.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        needed = "gcs" if "Google Storage" in text else extra  # etils, at the first path that begins with gs://
        return f"{text}; pip install 'npedit_jax[{needed}]'" if needed else None
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"a device has too little memory: {text}" if "RESOURCE_EXHAUSTED" in text else None
    return text if isinstance(error, ValueError | OSError | RunFault) else None


@contextlib.contextmanager
def told(name: str, extra: str = "") -> Iterator[None]:
    """Around what a command does: ends it with status 1 and `NAME: advice` where there is some."""
    try:
        yield
    except Exception as error:
        if (said := advice(error, extra)) is None:
            raise
        raise SystemExit(f"{name}: {said}") from error
