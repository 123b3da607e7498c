"""The pages that a person reads: everything on them is what the batch or the records hold."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from npedit_jax.data import inspect, records, report, select
from npedit_jax.data.batches import Feed
from npedit_jax.data.select import Filters
from npedit_jax.data.sources import RecordSource
from tests.data import record_sets


def text_of(path) -> str:
    return re.sub(r"\s+", " ", re.sub(r'src="data:[^"]*"', "", path.read_text()))


@pytest.mark.parametrize("packed", [0, 700])
def test_batches_as_the_model_sees_them(tmp_path, packed):
    made = record_sets.photograph_records(30)
    record_sets.changed(made, 4, image=b"")
    dataset = record_sets.edits(
        record_sets.write(tmp_path, made), Feed(0, 6, inner_batches=2), packed_length=packed, negative_prompt="ugly"
    )
    tools = {name: tool._tokenizer for name, tool in record_sets.tokenizers().items()}
    steps = {step: dataset[step] for step in range(4)}
    inspect.write(str(tmp_path / "page.html"), "title", steps, tools, RecordSource.edit_types, samples=6, inner=True)
    page = text_of(tmp_path / "page.html")
    told = np.concatenate([steps[step]["notes"]["id"].ravel() for step in steps])
    assert page.count("<dt>record</dt>") == 48 and all(f"<dd>{id}</dd>" in page for id in told)
    style = [batch["edit_type"] == RecordSource.edit_types.index("style") for batch in steps.values()]
    good = [batch["weight"] == 1 for batch in steps.values()]
    assert page.count("The editor was told: style item") == np.sum(np.array(style) & np.array(good))
    assert "Is this to be seen in the image: cat?" in page and "[16 tokens, rows 16 to 31 of the images]" in page
    assert "Step 3, inner batch 2 of 2" in page and "ugly" in page
    assert page.count("<dt>edit_type</dt><dd>style</dd>") == np.sum(style)
    assert ("bad" in page) and ("empty: the image file is empty" in page) == any("0004" in id for id in told)


def test_command_shows_the_batches_of_a_config(tmp_path):
    record_sets.write(tmp_path / "photographs", record_sets.photograph_records(30))
    (tmp_path / "config.py").write_text(
        "from tests.training.test_records import config\n"
        f"def get_config():\n    return config({str(tmp_path / 'photographs')!r})\n"
    )
    command = [sys.executable, "-m", "npedit_jax.data.inspect", "--config", str(tmp_path / "config.py")]
    command += ["--output", str(tmp_path / "page.html"), "--steps", "2", "--start", "3", "--samples", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout.strip() == str(tmp_path / "page.html"), result.stderr
    page = text_of(tmp_path / "page.html")
    assert page.count("<dt>record</dt>") == 8 and "Step 4, 32 x 32" in page and "Stage warmup" in page


def test_report_counts_what_the_index_holds(tmp_path):
    made = record_sets.photograph_records(30)
    record_sets.changed(made, 3, width=20)
    record_sets.changed(made, 4, instruction='<script>alert("x")</script>')
    record_sets.changed(made, 6, image=b"broken", instruction="unreadable one")
    found = record_sets.write(tmp_path / "set", made)
    select.apply(tmp_path / "set", Filters(min_side=64))
    report.write(records.Records(tmp_path / "set"), tmp_path / "page.html", buckets=record_sets.BUCKETS, samples=30)
    page = text_of(tmp_path / "page.html")
    assert "30 records in 1 shards" in page and "29 are used" in page
    assert re.search(r"<td>remove</td> ?<td>5</td> ?<td>5</td> ?<td>5</td> ?<td>15</td>", page)
    assert re.search(r"<td>style</td> ?<td>4</td> ?<td>5</td> ?<td>5</td> ?<td>14</td>", page)
    assert "<td>small_image</td><td>1</td>" in page and "left out: small_image" in page
    assert "<script>" not in page and "unknown: no readable" in page
    command = [sys.executable, "-m", "npedit_jax.data.report", "--records", str(tmp_path / "set")]
    command += ["--output", str(tmp_path / "again.html"), "--check"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().endswith("again.html")
    (tmp_path / "set" / found.manifest["shards"][0]["file"]).write_bytes(b"x")
    damaged = subprocess.run(command, check=False, capture_output=True, text=True)
    assert damaged.returncode == 1 and "array_record-00000" in damaged.stderr
