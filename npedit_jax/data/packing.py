"""A sample's questions in one packed row, which holds their common beginning once.

    | shared beginning | identity question | edit question | padding |
    segment     0      |         2         |       1       |   -1

Two questions about the same two images share the images and the words up to where their texts part. A question about
the edit alone begins differently, right after the chat's first tokens: its one image stands in its own part.

Shapes: Q questions per sample, L tokens of a prompt, S tokens of the row.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from npedit_jax.data.tokenize import QuestionTokens, TextError


class PackedQuestions(NamedTuple):
    """The arguments of `Scorer.answer_packed` for one sample, all int32.

    Attributes:
      ids: [S] token ids.
      positions: [S], of each token in its own question, the shared beginning counted.
      segments: [S], 0 on the shared beginning, 1 + q on the rest of question q, -1 on padding.
      image_index: [S], row of the sample's image-token table at each placeholder, -1 on text.
      answer_place: [Q], where in the row each question ends.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    image_index: np.ndarray
    answer_place: np.ndarray


def shared_length(prompts: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """Tokens that all prompts, (ids, image_index) each, begin with; at least the last of every prompt is its own."""
    longest = min(len(ids) for ids, _ in prompts) - 1
    first = prompts[0]
    same = np.ones(longest, bool)
    for prompt in prompts[1:]:
        for mine, theirs in zip(first, prompt, strict=True):
            same &= mine[:longest] == theirs[:longest]
    return longest if same.all() else int(same.argmin())


def pack(asked: Sequence[QuestionTokens], length: int, pad: int = 0) -> PackedQuestions:
    """Packs the questions of one sample into a row.

    Args:
      asked: one prompt each, ids, mask and image_index [L]; the last question stands first in the row.
      length: tokens of the row, S.
      pad: token id on padding.

    Raises:
      TextError: the questions do not fit in the row.
    """
    prompts = [(tokens.ids[tokens.mask], tokens.image_index[tokens.mask]) for tokens in asked]
    shared = shared_length(prompts)
    used = shared + sum(len(ids) - shared for ids, _ in prompts)
    if used > length:
        raise TextError(f"packed questions take {used} tokens and the row has {length}; raise packed_length")
    own = range(len(prompts) - 1, -1, -1)
    pieces = [(0, 0, shared, 0)] + [(q, shared, len(prompts[q][0]), 1 + q) for q in own]
    ends = np.cumsum([end - begin for _, begin, end, _ in pieces])

    def row(parts: Iterable[np.ndarray], padding: int) -> np.ndarray:
        values = np.concatenate(list(parts))
        return np.pad(values, (0, length - used), constant_values=padding).astype(np.int32)

    return PackedQuestions(
        ids=row((prompts[q][0][begin:end] for q, begin, end, _ in pieces), pad),
        positions=row((np.arange(begin, end) for _, begin, end, _ in pieces), 0),
        segments=row((np.full(end - begin, segment) for _, begin, end, segment in pieces), -1),
        image_index=row((prompts[q][1][begin:end] for q, begin, end, _ in pieces), -1),
        answer_place=ends[1:][::-1].astype(np.int32) - 1,
    )
