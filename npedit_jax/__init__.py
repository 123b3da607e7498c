"""NP-Edit in JAX and Flax: few-step image editing learned without pairs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npedit_jax.editor import Editor as Editor


def __getattr__(name: str) -> Any:
    """Imports `Editor` when it is first asked for, so that `import npedit_jax` stays light."""
    if name == "Editor":
        from npedit_jax.editor import Editor

        return Editor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
