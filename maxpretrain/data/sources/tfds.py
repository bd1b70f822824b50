"""`tfds:NAME[/CONFIG][:VERSION]`: a prepared dataset of tensorflow-datasets, through its data source API, without tensorflow.

Formats with random access (array_record, parquet) are read here; tfrecord is tensorflow's own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maxpretrain.data.clean import NO_TEXT, BadDocument, Document, decode
from maxpretrain.data.sources import base
from maxpretrain.data.sources.base import Part, Source
from maxpretrain.data.store import canonical
from maxpretrain.errors import UserError


@dataclass
class TensorFlowDatasets(Source):
    """Documents of one split.

    Attributes:
        dataset: NAME[/CONFIG][:VERSION].
        split: of it, as `train` or `train[:10%]`.
        text_field: the feature that holds the text.
    """

    dataset: str = ""
    split: str = "train"
    text_field: str = "text"

    def __post_init__(self) -> None:
        builder = _builder(self.dataset)
        info = self._info(builder)
        self.size = int(info.num_bytes) or 1
        self._fingerprint = _fingerprint(builder, self.split, self.text_field)
        self._examples = info.num_examples

    def _info(self, builder: Any) -> Any:
        splits = builder.info.splits
        if not splits:
            raise UserError(
                f"the dataset {self.dataset} is not prepared in {builder.data_path}; set TFDS_DATA_DIR to where it is, or prepare it once with "
                f"tfds.builder('{self.dataset}', file_format='array_record').download_and_prepare()"
            )
        try:
            info = splits[self.split]
        except (KeyError, ValueError):
            raise UserError(
                f'the dataset {self.dataset} has no split "{self.split}"; set data.tfds_split to one of {", ".join(splits)}'
            ) from None
        if self.text_field not in builder.info.features:
            raise UserError(
                f'the dataset {self.dataset} has no feature "{self.text_field}"; set data.text_field to one of {", ".join(builder.info.features)}'
            )
        return info

    def _source(self) -> Any:
        builder = _builder(self.dataset)
        try:
            source = builder.as_data_source(self.split)
        except (NotImplementedError, ImportError) as error:
            kind = builder.info.file_format
            raise UserError(
                f"the dataset {self.dataset} is stored as {getattr(kind, 'value', kind)}, which only tensorflow reads; prepare it again with "
                f"file_format='array_record', or install tensorflow to convert it"
            ) from error
        if (
            len(source) != self._examples
        ):  # tensorflow-datasets gives the whole split of a Parquet dataset, whatever slice was asked for
            raise UserError(
                f'tensorflow-datasets gives {len(source)} examples for data.tfds_split "{self.split}" of {self.dataset}, which has '
                f"{self._examples}: slices do not work for this format; use a whole split, or file_format='array_record'"
            )
        return source

    def units(self) -> list[Any]:
        return [self]

    def parts(self, unit: Any) -> Iterator[Part]:
        count = len(self._source())
        step = max(1, count * base.PART_BYTES // self.size)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield Part(None, start, stop, self.size * (stop - start) // count)

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        source = self._source()
        for i in range(part.start, part.stop):
            record = source[i]
            id = f"{self.dataset}/{self.split}:{i}"
            text = record.get(self.text_field)
            if isinstance(text, str):
                text = text.encode("utf-8", "surrogatepass")
            if not isinstance(text, bytes):
                yield BadDocument(id, NO_TEXT, f"a {type(text).__name__}")
            else:
                yield decode(text, id)

    def fingerprint(self) -> str:
        return self._fingerprint


def _builder(dataset: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            f'tensorflow-datasets knows no dataset "{dataset}", and TFDS_DATA_DIR holds none; check the name after "tfds:"'
        ) from None
    except ImportError as error:
        raise UserError(
            f"the dataset {dataset} cannot be opened without tensorflow ({error}); install tensorflow, or name files instead"
        ) from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"the dataset {dataset} cannot be opened: {str(error).splitlines()[0][:200]}") from None


def _fingerprint(builder: Any, split: str, text_field: str) -> str:
    folder = str(builder.data_path)
    rows = [[name, os.stat(os.path.join(folder, name)).st_size] for name in sorted(os.listdir(folder))]
    return hashlib.sha256(canonical([builder.info.full_name, split, text_field, rows])).hexdigest()
