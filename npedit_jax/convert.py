"""Converts a network once: `python -m npedit_jax.convert --model zimage --source HF_DIR --output DIR`.

The source is a directory in the Hugging Face layout; the output holds the same parameters as an Orbax checkpoint, of
which every host of a pod reads its own shards. A config takes either as the `directory` of a network. The network must
fit into the memory of this machine twice; accelerators are not needed (JAX_PLATFORMS=cpu).
"""

import argparse

import jax
from absl import logging
from etils import epath

from npedit_jax import commands, weights
from npedit_jax.weights import converted
from npedit_jax.weights.saving import check_new, copy_tokenizer


def convert(kind: str, source: epath.PathLike, output: epath.PathLike, dtype: str | None = None) -> int:
    """Writes the converted directory and returns how many parameters it holds.

    config.json is written last: without it, the directory of an interrupted conversion is not read.

    Args:
      kind: a key of `weights.KINDS`.
      source: a Hugging Face directory; its tokenizer files are copied along.
      output: must not exist, or be empty.
      dtype: to store parameters in; None keeps each as it is.

    Raises:
      FileExistsError: the output has content.
      FileNotFoundError, ValueError: the source is not such a directory, see `weights.load`, or is converted already.
    """
    source, output = epath.Path(source), epath.Path(output)
    check_new(output)
    if converted.is_converted(source):
        raise ValueError(f"{source} is converted already; give a directory in the Hugging Face layout")
    _, params = weights.load(kind, source, dtype=dtype)
    output.mkdir(parents=True, exist_ok=True)
    converted.write(output, params)
    copy_tokenizer(source, output)
    (source / "config.json").copy(output / "config.json")
    return sum(x.size for x in jax.tree.leaves(params))


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and one line where it cannot convert."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=list(weights.KINDS), help="which network the source is")
    parser.add_argument("--source", required=True, help="directory with config.json and *.safetensors")
    parser.add_argument("--output", required=True, help="directory to write; must not exist, or be empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="to store; by default as in the source")
    arguments = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    with commands.told("convert"):
        count = convert(arguments.model, arguments.source, arguments.output, arguments.dtype)
    print(f"{arguments.output}: {count:,} parameters")


if __name__ == "__main__":
    main()
