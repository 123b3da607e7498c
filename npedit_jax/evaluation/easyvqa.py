"""The easy-VQA benchmark: every test image edited once in each way, judged from the pixels and by the scorer.

Images are uint8 [H, W, 3]; kept errors are in pixel values, 0 to 255. Shapes: n requests, B samples of a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from npedit_jax.data import easyvqa, easyvqa_reading
from npedit_jax.evaluation import easyvqa_judge

KEPT_LIMIT = 8.0  # kept error up to which an edit that is done also counts as having left the rest alone

# (images uint8 [B, H, W, 3], B instructions, B seeds) -> uint8 [B, H, W, 3]
EditBatch = Callable[[np.ndarray, list[str], list[int]], np.ndarray]
# Told how many requests were finished since the last call.
Advance = Callable[[int], Any]
Score = dict[str, Any]
Summary = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One edit to make: the image's index in the data, and what is asked for."""

    index: int
    edit: easyvqa.Edit


def requests(data: easyvqa.EasyVQA, seed: int) -> list[Request]:
    """One edit of each type for every image, in the order of the images.

    Target and wording of an image's edits follow from the seed and the image's index alone: a fraction of the data
    gets the same requests as the whole.
    """
    asked = []
    for index, shape in enumerate(data.shapes):
        rng = np.random.default_rng([seed, index])
        asked += [Request(index, easyvqa.draw_edit(rng, shape, edit_type)) for edit_type in easyvqa.EDIT_TYPES]
    return asked


def edit_all(
    edit_batch: EditBatch,
    data: easyvqa.EasyVQA,
    asked: Sequence[Request],
    *,
    seed: int,
    batch: int,
    advance: Advance = lambda count: None,
) -> np.ndarray:
    """Has every request carried out: uint8 [n, H, W, 3], in the order of the requests.

    Args:
      edit_batch: the editor. It gets batches of one size; the last is filled up with requests made before.
      seed: from it every request gets a seed of its own, which does not depend on the batch size.
      batch: requests per call.
      advance: called after each batch, for a progress bar.
    """
    seeds = np.random.default_rng(seed).integers(2**31, size=len(asked)).tolist()
    edited = np.empty((len(asked), *data.images.shape[1:]), np.uint8)
    for rows, count in _batches(len(asked), batch):
        references = data.images[[asked[row].index for row in rows]]
        instructions = [asked[row].edit.instruction for row in rows]
        edited[rows[:count]] = edit_batch(references, instructions, [seeds[row] for row in rows])[:count]
        advance(count)
    return edited


def score(data: easyvqa.EasyVQA, asked: Sequence[Request], edited: np.ndarray) -> list[Score]:
    """Judges every edit from its pixels alone.

    Returns:
      For each request: `image` (index), `edit_type`, `instruction`, `source` and `target` (colour and kind; the target
      of a removal is None), `done`, and `kept_error`, the mean absolute difference on the pixels that had to stay.
    """
    readings = {index: easyvqa_reading.read(data.images[index]) for index in {request.index for request in asked}}
    scores = []
    for request, result in zip(asked, edited, strict=True):
        index, edit = request.index, request.edit
        judgement = easyvqa_judge.judge_reading(data.images[index], readings[index], result, edit)
        scores.append(
            {
                "image": index,
                "edit_type": edit.edit_type,
                "instruction": edit.instruction,
                "source": dataclasses.asdict(edit.source),
                "target": dataclasses.asdict(edit.target) if edit.target else None,
                "done": judgement.done,
                "kept_error": judgement.kept_error,
            }
        )
    return scores


def summarise(scores: Sequence[Score]) -> Summary:
    """Figures of each edit type: `count`, `done` and `done_kept` in percent, mean `kept_error`.

    `done_kept` counts the edits that are done with a kept error of at most KEPT_LIMIT. Where the scorer was asked,
    `scorer_done` and `scorer_not_done` are its mean P(yes) to whether the edit was done (of a removal: whether the
    shape is still there), of the edits that are and of those that are not: a scorer that tells them apart has something
    to teach. "replace" has the same figures for each kind of target under `targets`.
    """
    summary = {}
    for edit_type in easyvqa.EDIT_TYPES:
        chosen = [item for item in scores if item["edit_type"] == edit_type]
        if not chosen:
            continue
        summary[edit_type] = _figures(chosen)
        if edit_type == "replace":
            by_kind = {kind: [x for x in chosen if x["target"]["kind"] == kind] for kind in easyvqa.CLASSES}
            summary[edit_type]["targets"] = {kind: _figures(part) for kind, part in by_kind.items() if part}
    return summary


def table_rows(summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the table, (name, figures): the edit types, and below "replace" its targets."""
    for edit_type, figures in summary.items():
        yield edit_type, figures
        for kind, part in figures.get("targets", {}).items():
            yield f"{edit_type} with a {kind}", part


def table(summary: Summary) -> str:
    """The summary as plain text."""
    lines = [f"{'edit':<24}{'count':>7}{'done %':>9}{'done, rest kept %':>19}{'kept error':>12}"]
    for name, part in table_rows(summary):
        line = f"{name:<24}{part['count']:>7}{part['done']:>9.1f}{part['done_kept']:>19.1f}{part['kept_error']:>12.2f}"
        lines.append(line)
    lines.append(f"rest kept: mean absolute difference of at most {KEPT_LIMIT:g} of 255 where nothing was to change")
    return "\n".join(lines)


def _batches(total: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers in batches of one size, and how many of them are new: the last batch begins again at row 0.

    One size means one compiled program.
    """
    for start in range(0, total, batch):
        yield np.arange(start, start + batch) % total, min(batch, total - start)


def _figures(scores: Sequence[Score]) -> dict[str, Any]:
    done = np.array([item["done"] for item in scores])
    kept_error = np.array([item["kept_error"] for item in scores])
    answers = np.array([item.get("scorer_edit", np.nan) for item in scores])
    parts = {"scorer_done": answers[done], "scorer_not_done": answers[~done]}
    return {
        "count": len(scores),
        "done": 100.0 * float(done.mean()),
        "done_kept": 100.0 * float((done & (kept_error <= KEPT_LIMIT)).mean()),
        "kept_error": float(kept_error.mean()),
    } | {name: float(values.mean()) for name, values in parts.items() if len(values) and np.isfinite(values).all()}
