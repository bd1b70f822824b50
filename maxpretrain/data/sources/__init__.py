"""Where documents come from: one file a format, registered here."""

from __future__ import annotations

from maxpretrain.config import DataConfig
from maxpretrain.data.sources import jsonl, parquet, text
from maxpretrain.data.sources.base import FileSource, Part, Source, find_files
from maxpretrain.data.sources.embedded import Embedded
from maxpretrain.data.sources.tfds import TensorFlowDatasets

__all__ = ["FORMATS", "Part", "Source", "open_source"]

# Modules with parts(file, options, whole_documents) and documents(part, options).
FORMATS = {"text": text, "jsonl": jsonl, "parquet": parquet}
SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
PACKINGS = (".gz", ".zst")
UNREADABLE = {
    ".tfrecord": "TFRecord files need tensorflow; convert them to Parquet or JSON Lines, or name the dataset as tfds:NAME",
    ".array_record": "ArrayRecord files are read as a dataset; name it as tfds:NAME and set TFDS_DATA_DIR",
    **dict.fromkeys(
        (".csv", ".tsv", ".arrow", ".feather", ".avro", ".xml", ".html"),
        "this format is not read; convert it to Parquet or JSON Lines",
    ),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z"), "this archive is not read; unpack it, or use .gz or .zst"
    ),
    **dict.fromkeys(
        (".npy", ".npz", ".bin", ".pkl", ".pt", ".pdf", ".docx"),
        "this is no text; convert it to .txt, JSON Lines or Parquet",
    ),
}


def open_source(spec: str, data: DataConfig) -> Source:
    """The source that a string of the config names: `embedded`, `tfds:NAME`, or a path, folder or glob.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    if spec == "embedded":
        return Embedded(spec)
    if spec.startswith("tfds:"):
        return TensorFlowDatasets(
            spec, dataset=spec.removeprefix("tfds:"), split=data.tfds_split, text_field=data.text_field
        )
    files = find_files(spec)
    options = {"text_field": data.text_field, "separator": data.separator}
    return FileSource(spec, size=sum(f.size * (3 if f.packing else 1) for f in files), files=files, options=options)
