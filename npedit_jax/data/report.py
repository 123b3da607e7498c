"""What a set of records holds and what is left out of it, as a page.

python -m npedit_jax.data.report --records DIR --output page.html [--check]
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from etils import epath

from npedit_jax.data import buckets as buckets_lib
from npedit_jax.data import images, pages
from npedit_jax.data.records import KEPT, RecordError, Records

_BODY = """
<p>{{ manifest.count }} records in {{ manifest.shards | length }} shards, {{ bytes | filesizeformat }};
{{ manifest.kept }} are used, of {{ pictures_used }} different images.</p>
<h2>Records used, by edit type and bucket (height x width)</h2>
<div class="scroll"><table>
<tr><th>edit type</th>{% for h, w in buckets %}<th>{{ h }} x {{ w }}</th>{% endfor %}<th>all</th></tr>
{% for name, counts in table %}
<tr><td>{{ name }}</td>{% for count in counts %}<td>{{ count }}</td>{% endfor %}<td>{{ counts | sum }}</td></tr>
{% endfor %}
</table></div>
<h2>Texts and sizes of the records used</h2>
<div class="scroll"><table>
<tr><th></th><th>missing</th>{% for name in ("least", "median", "95 %", "most") %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, missing, values in lengths %}
<tr><td>{{ name }}</td><td>{{ missing }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>Left out</h2>
<div class="scroll"><table>
<tr><th>reason</th><th>records</th></tr>
{% for name, count in manifest.left_out.items() %}<tr><td>{{ name }}</td><td>{{ count }}</td></tr>
{% endfor %}
{% for name, count in (manifest.rejected or {}).items() %}
<tr><td>{{ name }} (never became a record)</td><td>{{ count }}</td></tr>
{% endfor %}
</table></div>
{% if manifest.unmapped %}
<h2>Edit types that we have no name for</h2>
<div class="scroll"><table>
<tr><th>edit type</th><th>records</th></tr>
{% for name, count in manifest.unmapped.items() %}<tr><td>{{ name }}</td><td>{{ count }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% for name, samples in groups %}
<h2>{{ name }}</h2>
<div class="pictures">
{% for sample in samples %}
<figure>{% if sample.pixels is not none %}{{ picture(sample.pixels, 176) }}{% endif %}
<figcaption>{% if sample.problem %}<div class="bad">{{ sample.problem }}</div>{% endif %}
{{ sample.instruction }}<br>
<small>{{ sample.edit_type }} · {{ sample.width }} x {{ sample.height }} · {{ sample.id }}</small>
</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
"""


def write(
    found: Records,
    output: epath.PathLike,
    *,
    buckets: Sequence[tuple[int, int]] = buckets_lib.BUCKETS,
    samples: int = 8,
) -> None:
    """Writes the page: counts, and pictures of `samples` records of each edit type and of each reason to leave out."""
    rows = found.index
    used = rows[rows["left_out"] == KEPT]
    bucket = buckets_lib.choose(used["height"], used["width"], buckets)
    table = []
    for number, name in sorted(enumerate(found.edit_types), key=lambda item: item[1]):
        table.append((name, np.bincount(bucket[used["edit_type"] == number], minlength=len(buckets)).tolist()))
    groups = []
    for number, name in enumerate(found.edit_types):
        groups.append((name, np.flatnonzero((rows["left_out"] == KEPT) & (rows["edit_type"] == number))))
    for number, reason in enumerate(found.manifest["left_out"], start=1):
        groups.append((f"left out: {reason}", np.flatnonzero(rows["left_out"] == number)))
    rng = np.random.default_rng(0)
    pages.write(
        output,
        f"Records of {found.manifest.get('name', found.directory.name)}",
        _BODY,
        manifest={"rejected": {}, "unmapped": {}} | found.manifest,
        bytes=sum(shard["bytes"] for shard in found.manifest["shards"]),
        pictures_used=len(np.unique(used["image"])),
        buckets=buckets,
        table=table,
        lengths=[_spread(name, used[field]) for name, field in _MEASURES.items()] if len(used) else [],
        groups=[
            (name, [_sample(found, int(n)) for n in rng.permutation(numbers)[:samples]])
            for name, numbers in groups
            if len(numbers)
        ],
    )


_MEASURES = {
    "instruction, characters": "instruction",
    "edited caption, characters": "edited_caption",
    "input caption, characters": "input_caption",
    "height, pixels": "height",
    "width, pixels": "width",
}


def _spread(name: str, values: np.ndarray) -> tuple[str, int, list[int]]:
    there = values[values > 0]
    spread = np.quantile(there, (0, 0.5, 0.95, 1)).round().astype(int).tolist() if len(there) else []
    return name, int((values == 0).sum()), spread


def _sample(found: Records, number: int) -> dict:
    """A record as the page shows it, or why it cannot be shown."""
    try:
        record = found[number]
    except RecordError as error:
        nothing = dict.fromkeys(("instruction", "edit_type", "width", "height"), "")
        return {"pixels": None, "problem": str(error), "id": found.shards.describe(number), **nothing}
    shown = {name: getattr(record, name) for name in ("instruction", "edit_type", "width", "height", "id")}
    scale = 176 / record.width
    try:
        size = (max(1, round(scale * record.height)), 176)
        return shown | {"pixels": images.decode(record.image, size), "problem": ""}
    except images.BadImage as error:
        return shown | {"pixels": None, "problem": f"{error.reason}: {error}"}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.data.report", description=__doc__.split("\n")[0])
    parser.add_argument("--records", required=True, help="a directory of records")
    parser.add_argument("--output", required=True, help="the page to write, .html")
    parser.add_argument("--samples", type=int, default=8, help="pictures of each edit type and reason (8)")
    parser.add_argument("--check", action="store_true", help="first compares every shard with its checksum")
    arguments = parser.parse_args()
    try:
        found = Records(arguments.records)
        damaged = found.shards.damaged() if arguments.check else []
        write(found, arguments.output, samples=arguments.samples)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if damaged:
        print(f"report: shards missing or changed since they were written: {damaged}", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
