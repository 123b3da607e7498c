"""One HTML page of results: tables, and every edit beside its reference; several editors side by side.

Pictures are linked, relative to the page, so that a page of thousands stays small: keep it with the results.
"""

import os
import urllib.parse
from collections.abc import Collection, Sequence

import jinja2
from etils import epath

from npedit_jax import atomic
from npedit_jax.evaluation import results as results_lib
from npedit_jax.evaluation.results import FIGURES, Results

LABELS = {
    "done": "P(done)",
    "kept": "P(rest kept)",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "consistency": "semantic consistency",
    "quality": "perceptual quality",
    "overall": "overall",
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --paper: #fff; --line: #d9dce1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a8; --paper: #17191c; --line: #3a3e45; } }
body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { color: var(--soft); max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.sum td { font-weight: 600; }
.row { border-bottom: 1px solid var(--line); padding: .9rem 0; }
.row > div { display: flex; gap: 1rem; flex-wrap: wrap; }
figure { margin: .4rem 0 0; width: 16rem; }
img { display: block; max-width: 100%; min-width: 8rem; height: auto; border: 1px solid var(--line); }
figcaption { font-size: 13px; line-height: 1.4; color: var(--soft); margin-top: .3rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>P(done) and P(rest kept) are the scorer's probabilities, from 0 to 1. SSIM and PSNR compare an edit with its
reference, outside the mask where a case has one. Semantic consistency, perceptual quality and overall are VIEScore's,
from 0 to 10.</p>
{% for name, count in left_out.items() -%}
<p>{{ count }} more edits of {{ name }} are of pictures, instructions or masks that the others do not have.</p>
{% endfor -%}
{% for part, lines in tables.items() -%}
<h2>{{ part or "Figures" }}</h2>
<div class="scroll"><table>
<tr><th>task</th>{% if names | length > 1 %}<th>editor</th>{% endif %}<th>count</th>
{%- for name in figures %}<th>{{ labels[name] }}</th>{% endfor %}</tr>
{% for task, name, found in lines -%}
<tr{% if task in sums %} class="sum"{% endif %}><td>{{ task }}</td>
{%- if names | length > 1 %}<td>{{ name }}</td>{% endif %}<td>{{ found.count }}</td>
{%- for figure in figures %}<td>{{ "%.3f" % found[figure] if figure in found else "–" }}</td>{% endfor %}</tr>
{% endfor -%}
</table></div>
{% endfor -%}
<h2>Edits</h2>
{% for case in cases -%}
<div class="row"><b>{{ case.instruction }}</b>
<small>{{ case.task }}{% if case.part %}, {{ case.part }}{% endif %}</small>
<div>
<figure><img loading="lazy" src="{{ case.reference }}" alt="reference"><figcaption>reference</figcaption></figure>
{% for name, picture, found in case.edits -%}
<figure><img loading="lazy" src="{{ picture }}" alt="{{ case.instruction }}"><figcaption>{{ name }}
{%- for figure in figures if figure in found %}<br>{{ labels[figure] }} {{ "%.2f" % found[figure] }}{% endfor %}
</figcaption></figure>
{% endfor -%}
</div></div>
{% endfor -%}
</body>
</html>
"""


def write(
    page: epath.PathLike, runs: Sequence[Results], title: str, keys: Collection[str] | None = None
) -> dict[str, int]:
    """Writes the page of one run, or of several side by side; of these, the edits that all have.

    Args:
      keys: of the edits to show; None is all.

    Returns:
      How many edits of each run are not among those shown, by its name on the page; the page says it too.

    Raises:
      ValueError: the runs have no edit in common.
    """
    page = epath.Path(page)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    rows = [{row["key"]: row for row in run.rows(keys)} for run in runs]
    common = [key for key, row in rows[0].items() if all(_same(row, other.get(key)) for other in rows)]
    if not common:
        raise ValueError(
            f"{' and '.join(str(run.directory) for run in runs)} have no edit in common: none of the same picture, "
            "instruction and mask"
        )
    left_out = {name: len(mine) - len(common) for name, mine in zip(names, rows, strict=True)}
    tables: dict[str, list] = {}
    summaries = [results_lib.summarise([mine[key] for key in common]) for mine in rows]
    for part, tasks in summaries[0].items():
        tables[part] = [
            (task, name, summary[part][task]) for task in tasks for name, summary in zip(names, summaries, strict=True)
        ]
    cases = [
        rows[0][key]
        | {
            "reference": _link(page, runs[0].reference(key)),
            "edits": [
                (name, _link(page, run.picture(key)), mine[key])
                for name, run, mine in zip(names, runs, rows, strict=True)
            ],
        }
        for key in common
    ]
    used = [name for name in FIGURES if any(name in row for mine in rows for row in mine.values())]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(PAGE).render(
        title=title,
        tables=tables,
        cases=cases,
        figures=used,
        labels=LABELS,
        names=names,
        left_out={name: count for name, count in left_out.items() if count},
        sums=(results_lib.ALL, results_lib.TASKS),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(page, text)
    return left_out


def _same(row: results_lib.Row, other: results_lib.Row | None) -> bool:
    """Whether both are of one case: keys are numbers in some benchmarks, the same for other pictures."""
    return other is not None and all(row.get(name) == other.get(name) for name in ("case", "instruction", "part"))


def _link(page: epath.Path, file: epath.Path) -> str:
    return urllib.parse.quote(os.path.relpath(os.fspath(file), os.fspath(page.parent)))
