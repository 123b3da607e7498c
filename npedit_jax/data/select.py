"""Which records are used: duplicates, small images and unusable texts are left out in the index, the files stay.

    python -m npedit_jax.data.select --records DIR [--min-side 256] [--max-instruction 1000] ...

Started again with other limits it begins from all records.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from npedit_jax.data import edit_types
from npedit_jax.data.records import KEPT, Records, save_index

REASONS = (
    "small_image", "elongated", "no_instruction", "long_instruction", "unmapped_edit_type", "no_object", "duplicate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits of what is used.

    Attributes:
      duplicates: whether of the records with the same image and instruction that pass the rest the first alone is used.
      min_side: pixels of the shorter side.
      max_elongation: the longer side over the shorter.
      instruction: whether records need one; those without can be given one, see `data.instructions`.
      max_instruction: characters.
      known_edit_types: whether only those of EDIT_TYPES are used.
      object: whether removals need one, which their question is about; `data.instructions` writes those too.
    """

    duplicates: bool = True
    min_side: int = 256
    max_elongation: float = 3.0
    instruction: bool = True
    max_instruction: int = 1000
    known_edit_types: bool = True
    object: bool = True


def apply(directory: epath.PathLike, filters: Filters) -> dict[str, int]:
    """Rewrites index and manifest; returns how many records each reason leaves out (the first that holds counts)."""
    found = Records(directory)
    save(directory, found.manifest, found.index, filters)
    return Records(directory).manifest["left_out"]


def save(directory: epath.PathLike, manifest: Mapping[str, Any], index: np.ndarray, filters: Filters) -> None:
    """Writes index and manifest with what the filters leave out."""
    rows = index.copy()
    short, long = np.minimum(rows["height"], rows["width"]), np.maximum(rows["height"], rows["width"])
    known = np.isin(manifest["edit_types"], edit_types.EDIT_TYPES)[rows["edit_type"]]
    removal = np.isin(manifest["edit_types"], edit_types.REMOVE)[rows["edit_type"]]
    holds = {
        "small_image": short < filters.min_side,
        "elongated": long > filters.max_elongation * short,
        "no_instruction": filters.instruction & (rows["instruction"] == 0),
        "long_instruction": rows["instruction"] > filters.max_instruction,
        "unmapped_edit_type": filters.known_edit_types & ~known,
        "no_object": filters.object & removal & (rows["object"] == 0),
    }
    rows["left_out"] = KEPT
    for reason in reversed(holds):
        rows["left_out"][holds[reason]] = 1 + REASONS.index(reason)
    if filters.duplicates:  # of what is left, so that one of several that are alike is used
        kept = np.flatnonzero(rows["left_out"] == KEPT)
        rows["left_out"][kept[repeated(rows["content"][kept])]] = 1 + REASONS.index("duplicate")
    facts = {"filters": dataclasses.asdict(filters), "unmapped": unmapped(manifest["edit_types"], rows["edit_type"])}
    save_index(directory, {**manifest, **facts}, rows, REASONS)


def unmapped(names: Sequence[str], numbers: np.ndarray) -> dict[str, int]:
    """Records of each edit type that is none of ours, most first: what a mapping in `edit_types` would win.

    Args:
      names: of the set's edit types.
      numbers: for each record that of its type.
    """
    counts = zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True)
    others = [(name, count) for name, count in counts if count and name not in edit_types.EDIT_TYPES]
    return {name or "(none)": count for name, count in sorted(others, key=lambda item: -item[1])}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each limit."""
    default = Filters()
    parser.add_argument("--min-side", type=int, default=default.min_side, help=f"pixels ({default.min_side})")
    parser.add_argument("--max-elongation", type=float, default=default.max_elongation, help="long over short side (3)")
    parser.add_argument("--max-instruction", type=int, default=default.max_instruction, help="characters (1000)")
    parser.add_argument("--keep-duplicates", action="store_true", help="same image and instruction")
    parser.add_argument("--keep-without-instruction", action="store_true", help="for the warm-up, or to write them")
    parser.add_argument("--keep-without-object", action="store_true", help="removals, for the warm-up")
    parser.add_argument("--keep-unmapped", action="store_true", help="edit types that we have no name for")


def filters_of(arguments: argparse.Namespace) -> Filters:
    """The limits that the options set."""
    return Filters(
        duplicates=not arguments.keep_duplicates,
        min_side=arguments.min_side,
        max_elongation=arguments.max_elongation,
        instruction=not arguments.keep_without_instruction,
        max_instruction=arguments.max_instruction,
        known_edit_types=not arguments.keep_unmapped,
        object=not arguments.keep_without_object,
    )


def repeated(values: np.ndarray) -> np.ndarray:
    """True on every value that stood before."""
    repeated = np.ones(len(values), bool)
    repeated[np.unique(values, return_index=True)[1]] = False
    return repeated


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.data.select", description=__doc__.split("\n")[0])
    parser.add_argument("--records", required=True, help="a directory of records")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        left_out = apply(arguments.records, filters_of(arguments))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"select: {error}", file=sys.stderr)
        return 1
    manifest = Records(arguments.records).manifest
    others = f", edit types without a name of ours: {json.dumps(manifest['unmapped'])}" if manifest["unmapped"] else ""
    print(f"{arguments.records}: {manifest['kept']} kept, left out {json.dumps(left_out)}{others}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
