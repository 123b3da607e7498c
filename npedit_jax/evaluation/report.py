"""The report of an evaluated run: one HTML page that holds its pictures and curves itself."""

import base64
import dataclasses
import io
from collections.abc import Sequence

import jinja2
import markupsafe
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from npedit_jax import contact_sheet
from npedit_jax.data.easyvqa import EasyVQA
from npedit_jax.evaluation import easyvqa

# Stands in the drawing for the page's own text colour, which changes with light and dark.
INK = "#010203"
CURVE_STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "npedit",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --paper: #fff; --line: #d9dce1;
  --good: #18794e; --bad: #c02b3a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa0a8; --paper: #17191c; --line: #3a3e45; --good: #4cc38a; --bad: #ff7b86; }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { color: var(--soft); max-width: 44rem; margin: .25rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.part td { color: var(--soft); }
.part td:first-child { padding-left: 1.2rem; }
.row { display: grid; grid-template-columns: repeat({{ columns }}, minmax(9rem, 1fr)); gap: 1rem;
  padding: .9rem 0; border-bottom: 1px solid var(--line); }
figure { margin: 0; }
img { display: block; width: 128px; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { margin-top: .35rem; font-size: 13px; line-height: 1.4; }
figcaption div { color: var(--soft); }
figcaption .good { color: var(--good); }
figcaption .bad { color: var(--bad); }
svg { max-width: 100%; height: auto; color: var(--ink); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Judged from the pixels alone. The kept error is the mean absolute difference, 0 to 255, on the pixels that had to
stay; the rest counts as kept up to {{ "%g" % kept_limit }}.</p>
<h2>Edits of {{ image_count }} images</h2>
<div class="scroll"><table>
<tr><th>edit</th><th>count</th><th>done</th><th>done, rest kept</th><th>kept error</th></tr>
{% for name, figures, part in table -%}
<tr{% if part %} class="part"{% endif %}><td>{{ name }}</td><td>{{ figures.count }}</td>
<td>{{ "%.1f" % figures.done }} %</td><td>{{ "%.1f" % figures.done_kept }} %</td>
<td>{{ "%.2f" % figures.kept_error }}</td></tr>
{% endfor -%}
</table></div>
<h2>Gallery</h2>
<p>The first {{ gallery | length }} of these images, not chosen.
{%- if scored %} P(yes) is the scorer's: was the edit done (after a removal: is the object there), and is the rest
the same.{% endif %}</p>
<div class="scroll">
{% for row in gallery -%}
<div class="row">
<figure><img src="{{ row.reference | data_uri }}" alt="reference"><figcaption>reference</figcaption></figure>
{% for cell in row.cells -%}
<figure><img src="{{ cell.picture | data_uri }}" alt="{{ cell.instruction }}"><figcaption>{{ cell.instruction }}
<div class="{{ 'good' if cell.done else 'bad' }}">{{ "✓ done" if cell.done else "✗ not done" }}</div>
<div>kept error {{ "%.1f" % cell.kept_error }}</div>
{% if cell.answers %}<div>P(yes), {{ cell.question }}: {{ "%.2f" % cell.answers[0] }}</div>
<div>P(yes), rest same: {{ "%.2f" % cell.answers[1] }}</div>
{% endif %}</figcaption></figure>
{% endfor -%}
</div>
{% endfor -%}
</div>
{% if curves -%}
<h2>Training</h2>
<p>Thin: as logged. Thick: mean over a tenth of the run. Scorer: its probability of the wanted answer.</p>
{{ curves }}
{% endif -%}
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One edit in the gallery; `answers` are P(yes) to the edit question, named `question`, and the identity one."""

    picture: np.ndarray  # uint8 [H, W, 3]
    instruction: str
    done: bool
    kept_error: float
    question: str
    answers: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One image in the gallery, uint8 [H, W, 3], with its edits."""

    reference: np.ndarray
    cells: list[Cell]


def render(
    data: EasyVQA,
    asked: Sequence[easyvqa.Request],
    edited: np.ndarray,
    scores: Sequence[easyvqa.Score],
    metrics: Sequence[dict[str, float]] = (),
    *,
    title: str,
    images: int = 24,
) -> str:
    """The page as a string: the table, a gallery of the first images, the training curves.

    Args:
      data: the images.
      asked: the requests, n.
      edited: uint8 [n, H, W, 3].
      scores: as `easyvqa.score` gives them; where they hold `scorer_edit` and `scorer_identity` these are shown too.
      metrics: rows of metrics.jsonl; no curves where there are none.
      title: the page's heading.
      images: how many images the gallery shows.
    """
    rows = gallery(data, asked, edited, scores, images)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_uri"] = data_uri
    lines = easyvqa.table_rows(easyvqa.summarise(scores))
    return environment.from_string(PAGE).render(
        title=title,
        kept_limit=easyvqa.KEPT_LIMIT,
        image_count=len({request.index for request in asked}),
        table=[(name, figures, " with a " in name) for name, figures in lines],
        gallery=rows,
        columns=1 + max((len(row.cells) for row in rows), default=0),
        scored=any(cell.answers for row in rows for cell in row.cells),
        curves=curves(metrics),
    )


def gallery(
    data: EasyVQA,
    asked: Sequence[easyvqa.Request],
    edited: np.ndarray,
    scores: Sequence[easyvqa.Score],
    images: int,
) -> list[Row]:
    """The first images that were edited, each with all its edits."""
    rows: dict[int, Row] = {}
    for request, picture, score in zip(asked, edited, scores, strict=True):
        if request.index not in rows:
            if len(rows) == images:
                break
            rows[request.index] = Row(data.images[request.index], [])
        answers = (score["scorer_edit"], score["scorer_identity"]) if "scorer_edit" in score else None
        question = "there" if request.edit.edit_type == "remove" else "done"
        cell = Cell(picture, request.edit.instruction, score["done"], score["kept_error"], question, answers)
        rows[request.index].cells.append(cell)
    return list(rows.values())


def sheet(
    data: EasyVQA,
    asked: Sequence[easyvqa.Request],
    edited: np.ndarray,
    scores: Sequence[easyvqa.Score],
    images: int = 6,
) -> Image.Image:
    """The first images as one picture, arguments as of `render`: a row of the reference and its edits for each."""
    drawn = []
    for row in gallery(data, asked, edited, scores, images):
        cells = [contact_sheet.Cell(Image.fromarray(row.reference), ("reference",))]
        for cell in row.cells:
            lines = [cell.instruction, "judge: done" if cell.done else "judge: not done"]
            if cell.answers:
                edit, identity = cell.answers
                lines.append(f"scorer: {cell.question} {edit:.2f}, kept {identity:.2f}")
            cells.append(contact_sheet.Cell(Image.fromarray(cell.picture), tuple(lines)))
        drawn.append(("", cells))
    return contact_sheet.draw(drawn)


def data_uri(image: np.ndarray) -> str:
    """A uint8 image [H, W, 3] as the address of a PNG that it holds itself."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(metrics: Sequence[dict[str, float]]) -> markupsafe.Markup | None:
    """Losses, each with a panel of its own, and the scorer's probabilities in one, as SVG; None without any."""
    names = sorted({name for row in metrics for name in row})
    losses = [name for name in names if name.startswith("loss/")] or [name for name in names if name == "loss"]
    answers = [name for name in names if name.startswith("scorer/")]
    panels = [[name] for name in losses] + ([answers] if answers else [])
    if not panels:
        return None
    lines = -(-len(panels) // 3)
    with matplotlib.rc_context(CURVE_STYLE):
        figure = Figure(figsize=(9.6, 2.5 * lines), layout="constrained")
        figure.patch.set_alpha(0.0)
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(lines, min(3, len(panels)), number + 1)
            axes.patch.set_alpha(0.0)
            axes.set_xlabel("step")
            if panel is answers:
                axes.set(title="scorer", ylim=(0, 1))
            else:
                axes.set_title(panel[0].replace("/", ": ").replace("_", " "))
            for name in panel:
                draw_curve(axes, metrics, name)
            if len(panel) > 1:
                axes.legend()
        return as_markup(figure)


def draw_curve(axes: Axes, metrics: Sequence[dict[str, float]], name: str) -> None:
    """One metric over the steps, as logged and smoothed; values that were not finite are left out."""
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if not points:
        return
    steps, values = np.array(points, np.float64).T
    window = max(1, len(values) // 10)
    counts = np.convolve(np.ones_like(values), np.ones(window), mode="same")
    smooth = np.convolve(values, np.ones(window), mode="same") / counts
    (line,) = axes.plot(steps, smooth, linewidth=1.8, label=name.split("/")[-1])
    axes.plot(steps, values, linewidth=0.7, alpha=0.35, color=line.get_color())


def as_markup(figure: Figure) -> markupsafe.Markup:
    """A figure as an SVG element in the page's own text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return markupsafe.Markup(text[text.index("<svg") :].replace(INK, "currentColor"))
