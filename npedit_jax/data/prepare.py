"""Prepares records from a set's own layout with Apache Beam: `python -m npedit_jax.data.prepare --layout release ...`.

    python -m npedit_jax.data.prepare --layout release --input merged_edit_data.json --root images \\
        --name edits --output records [--beam --runner=DataflowRunner --beam --project=...]

A TensorFlow Datasets builder, so the result is a data set of its own: records/NAME/1.0.0 has dataset_info.json,
features.json and ArrayRecord shards, beside our manifest and index. The input is cut into spans of items; each span
becomes one shard, written record by record by one worker. Nothing is shuffled: the shards are read at random anyway. So
memory does not grow with the input, on the local runner as on Dataflow, Flink or Spark. Workers on other machines read
the input and write the output where the paths say: on a bucket, or on a disk that all of them have mounted.

Needs the extra `prepare`; training does not.
"""

import argparse
import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from npedit_jax.data import layouts, records, select

try:
    import apache_beam as beam
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_builder
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"prepare: {error}; pip install 'npedit_jax[prepare]', best in an environment of its own")

NAME = "edits"  # of the files; the set's own name is that of its directory
REJECTED = "rejected.jsonl"
_KINDS = {
    bytes: lambda: tfds.features.Tensor(shape=(), dtype=np.bytes_),
    str: tfds.features.Text,
    int: lambda: np.int64,
}


class TooManyRejected(RuntimeError):
    """More items than the given share became no record."""


@dataclasses.dataclass
class EditsConfig(tfds.core.BuilderConfig):
    """What is prepared.

    Attributes:
      layout: where items are and what they mean.
      per_shard: items, at most.
      max_rejected_share: items that may become no record.
      filters: what of the records is used.
    """

    layout: layouts.Layout | None = None
    per_shard: int = 1000
    max_rejected_share: float = 0.05
    filters: select.Filters = select.Filters()


class Edits(dataset_builder.FileReaderBuilder):
    """Reference images with instructions."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: EditsConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: _KINDS[kind]() for name, kind in records.FIELDS.items()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _download_and_prepare(self, dl_manager: object, download_config: tfds.download.DownloadConfig) -> None:
        """Writes the shards into `data_dir`, which TFDS moves to its place when all is done."""
        del dl_manager
        config, directory = self.builder_config, epath.Path(self.data_dir)
        spans = config.layout.spans(config.per_shard)
        if not spans:
            raise ValueError(f"no items in {config.layout.paths}")
        shards = [records.shard_name(NAME, number, len(spans)) for number in range(len(spans))]
        write = functools.partial(write_span, config.layout, config.name, str(directory))
        with beam.Pipeline(runner=download_config.beam_runner, options=download_config.beam_options) as pipeline:
            _ = (
                pipeline
                | "Spans" >> beam.Create(list(zip(shards, spans, strict=True)))
                | "SpreadOverWorkers" >> beam.Reshuffle()
                | "WriteShards" >> beam.MapTuple(write)
            )
        rejected = _gather_rejected(directory, shards)
        records.write_manifest(directory, shards, name=config.name, rejected=rejected)
        self._set_splits(records.Records(directory))
        _check_share(rejected, records.Records(directory), config.max_rejected_share)
        select.apply(directory, config.filters)

    def _set_splits(self, written: records.Records) -> None:
        shards = written.manifest["shards"]
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[shard["count"] for shard in shards],
            num_bytes=sum(shard["bytes"] for shard in shards),
            filename_template=self._get_filename_template("train"),
        )
        self.info.set_splits(tfds.core.splits.SplitDict([split]))


def write_span(layout: layouts.Layout, name: str, directory: str, shard: str, span: layouts.Span) -> None:
    """Writes one shard with its description, and what was rejected beside it; may be done again at any time."""
    path = epath.Path(directory) / shard

    with path.with_name(f"{shard}.{REJECTED}").open("w") as log:

        def kept() -> Iterator[records.Record]:
            for found in layout.records(span, name):
                if isinstance(found, records.Record):
                    yield found
                    continue
                place, error = found
                log.write(json.dumps({"place": place, "reason": error.reason, "message": str(error)[:300]}) + "\n")

        records.write_shard(path, kept())


def _gather_rejected(directory: epath.Path, shards: Sequence[str]) -> dict[str, int]:
    """Puts the lists of what was rejected together; how many for each reason."""
    counts: collections.Counter[str] = collections.Counter()
    with (directory / REJECTED).open("w") as whole:
        for shard in shards:
            part = directory / f"{shard}.{REJECTED}"
            with part.open("r") as lines:
                for line in lines:
                    counts[json.loads(line)["reason"]] += 1
                    whole.write(line)
            part.unlink()
    return dict(counts)


def _check_share(rejected: dict[str, int], written: records.Records, limit: float) -> None:
    count = sum(rejected.values())
    if count > limit * (count + len(written)):
        examples = (written.directory / REJECTED).read_text().splitlines()[:3]
        raise TooManyRejected(
            f"{count} of {count + len(written)} items became no record: {rejected}, for example {examples}; "
            f"mend the input, or raise --max-rejected-share above {limit}"
        )


def prepare(
    layout: layouts.Layout,
    name: str,
    output: epath.PathLike,
    *,
    per_shard: int = 1000,
    max_rejected_share: float = 0.05,
    beam_options: Sequence[str] = (),
    filters: select.Filters = select.Filters(),  # noqa: B008
) -> records.Records:
    """Writes a set to `output`/edits/NAME/1.0.0 and leaves out what the filters say.

    Raises:
      FileExistsError: a set of this name is there.
      ValueError: no items, or none to a shard.
      TooManyRejected: with counts by reason and examples.
    """
    if per_shard < 1:
        raise ValueError(f"--per-shard must be 1 or more; found {per_shard}")
    config = EditsConfig(
        name=name,
        version=Edits.VERSION,
        layout=layout,
        per_shard=per_shard,
        max_rejected_share=max_rejected_share,
        filters=filters,
    )
    builder = Edits(data_dir=str(output), config=config, file_format="array_record")
    if builder.data_path.exists():  # TFDS would take it for what is asked for
        raise FileExistsError(f"{builder.data_path} is there already; delete it or give another --name")
    options = beam.options.pipeline_options.PipelineOptions(list(beam_options))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(beam_options=options))
    return records.Records(builder.data_dir)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m npedit_jax.data.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--layout", required=True, choices=layouts.MEANINGS, help="how the input is laid out")
    parser.add_argument("--input", required=True, nargs="+", help="its files or directories; * stands for anything")
    parser.add_argument("--root", default="", help="what image paths are relative to; default: each input's directory")
    parser.add_argument("--field", action="append", default=[], metavar="OURS=THEIRS", help="a field of another name")
    parser.add_argument("--split", default="", help="of tfds and huggingface (train, or the only one)")
    parser.add_argument("--name", required=True, help="of the set")
    parser.add_argument("--output", required=True, help="records go to OUTPUT/edits/NAME/1.0.0")
    parser.add_argument("--per-shard", type=int, default=1000, help="items in a shard, at most (1000)")
    parser.add_argument("--max-rejected-share", type=float, default=0.05, help="ends above it (0.05)")
    parser.add_argument("--beam", action="append", default=[], metavar="OPTION", help="of Beam: --beam=--runner=...")
    select.add_arguments(parser)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    if wrong := [item for item in arguments.field if "=" not in item]:
        parser.error(f"--field takes OURS=THEIRS; found {wrong}")
    fields = dict(item.split("=", 1) for item in arguments.field)
    try:
        layout = layouts.layout(arguments.layout, arguments.input, arguments.root, fields, arguments.split)
        written = prepare(
            layout,
            arguments.name,
            arguments.output,
            per_shard=arguments.per_shard,
            max_rejected_share=arguments.max_rejected_share,
            beam_options=arguments.beam,
            filters=select.filters_of(arguments),
        )
    except (FileExistsError, FileNotFoundError, ImportError, ValueError, TooManyRejected) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    told = {key: written.manifest[key] for key in ("count", "kept", "left_out", "unmapped", "rejected")}
    print(f"{written.directory}: {json.dumps(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
