"""Small sets of records made of real photographs, and what it takes to make batches of them."""

import dataclasses
import itertools
import pathlib

from npedit_jax.data import pipeline, questions, records, tokenize
from npedit_jax.data.batches import Feed
from npedit_jax.data.records import Record, Records
from npedit_jax.data.sources import RecordSource
from tests.data.photographs import picture, save

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "tokenizer"
BUCKETS = ((32, 32), (40, 24), (24, 40))
SIZES = {(32, 32): (96, 96), (40, 24): (160, 96), (24, 40): (96, 160)}  # of the files, by the bucket they belong to
NAMES = ("china", "flower", "astronaut", "chelsea", "coffee", "motorcycle")
WEIGHTS = {"remove": 0.25, "style": 0.7, "nothing": 0.05}
GUIDANCE = {"remove": 7.5, "style": 3.5, "nothing": 1.0, "customization": 2.0}
TEXT_LENGTH, QUESTION_LENGTH, IMAGE_TOKENS = 64, 400, 16


def photograph_records(count: int, *, source: str = "photographs", edit_types=("remove", "style")) -> list[Record]:
    """Records of all three shapes and of these edit types, in turn."""
    found = []
    shapes = itertools.cycle(SIZES.values())
    for number, (height, width) in zip(range(count), shapes, strict=False):
        edit_type = edit_types[number // 3 % len(edit_types)]
        # One pixel tells the records apart; a PNG keeps it.
        image = picture(NAMES[number % len(NAMES)]).resize((width, height))
        image.putpixel((0, 0), (number % 256, number // 256, 0))
        found.append(
            Record(
                image=save(image, "PNG", compress_level=1),
                width=width,
                height=height,
                instruction=f"{edit_type} item {number}",
                edited_caption=f"photograph {number} after the edit",
                input_caption=f"photograph {number}",
                edit_type=edit_type,
                object="cat",
                id=f"{number:04d}",
                source=source,
            )
        )
    return found


def changed(found: list[Record], number: int, **changes) -> None:
    """Replaces fields of one record of a list."""
    found[number] = dataclasses.replace(found[number], **changes)


def write(directory, found: list[Record], name: str = "photographs") -> Records:
    """Writes records to a new directory."""
    return records.write(directory, name, found, per_shard=50)


def tokenizers() -> dict:
    """Text encoder's and scorer's tokenizer."""
    return dict(
        text=tokenize.TextTokenizer(GOLDEN, TEXT_LENGTH),
        scorer=tokenize.ScorerTokenizer(GOLDEN, IMAGE_TOKENS, QUESTION_LENGTH),
    )


def edits(found: Records, feed: Feed, *, weights=WEIGHTS, options=None, **changes):
    """The edit stage's dataset."""
    source = RecordSource({"photographs": found}, BUCKETS, **options or {})
    task = pipeline.Task(source, weights, questions.EDITING)
    return pipeline.npedit({"": task}, feed, guidance=GUIDANCE, **(tokenizers() | changes))
