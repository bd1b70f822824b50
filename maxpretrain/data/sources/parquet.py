"""Parquet files: a row a document, its text in the column `data.text_field`, its id in `id` (or the number of the row)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maxpretrain.data.clean import EMPTY, BadDocument, Document, decode
from maxpretrain.data.sources import base
from maxpretrain.data.sources.base import File, Part
from maxpretrain.errors import UserError

_ROWS = 1024


def _open(file: File) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{file.path} is not a whole Parquet file ({str(error).splitlines()[0][:100]}); get it again"
        ) from None


def parts(file: File, options: dict[str, str], whole_documents: bool) -> Iterator[Part]:
    """Runs of row groups of about one part's size."""
    import pyarrow as pa

    with _open(file) as opened:
        schema, meta = opened.schema_arrow, opened.metadata
        name = options["text_field"]
        if name not in schema.names:
            raise UserError(
                f'{file.path} has no column "{name}"; set data.text_field to one of {", ".join(schema.names[:12])}'
            )
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
        ):
            raise UserError(
                f'the column "{name}" of {file.path} holds {kind}, not text; set data.text_field to another'
            )
        column = next(i for i in range(meta.num_columns) if meta.schema.column(i).path == name)
        start = size = 0
        for group in range(meta.num_row_groups):
            size += meta.row_group(group).column(column).total_uncompressed_size
            if size >= base.PART_BYTES or group == meta.num_row_groups - 1:
                yield Part(file, start, group + 1, size)
                start, size = group + 1, 0


def documents(part: Part, options: dict[str, str]) -> Iterator[Document | BadDocument]:
    import pyarrow as pa

    name = options["text_field"]
    with _open(part.file) as opened:
        columns = [name] + (["id"] if "id" in opened.schema_arrow.names and name != "id" else [])
        row = sum(opened.metadata.row_group(g).num_rows for g in range(part.start))
        try:
            for batch in opened.iter_batches(_ROWS, row_groups=range(part.start, part.stop), columns=columns):
                texts = batch.column(name)
                if pa.types.is_dictionary(texts.type):
                    texts = texts.dictionary_decode()
                # As bytes: one invalid string would otherwise fail the whole batch.
                texts = texts.cast(pa.large_binary()).to_pylist()
                ids = batch.column("id").to_pylist() if "id" in columns else [None] * len(texts)
                for text, id in zip(texts, ids, strict=True):
                    id = str(id) if isinstance(id, str | int) else f"{part.file.name}:{row}"
                    yield BadDocument(id, EMPTY) if text is None else decode(text, id)
                    row += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{part.file.path} is damaged ({str(error).splitlines()[0][:100]}); get it again") from None
