"""Reads records from CSV, Parquet and Arrow files, `datasets` folders and the Hugging Face hub."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = (".csv", ".parquet", ".arrow")

Record = dict[str, Any]

PACKAGE = "pip install 'kimi-core[data]'"


def is_table(source: str, base_folder: str | Path = ".") -> bool:
    """Whether `records_of` reads this source: by its ending, as a folder, or as ``hub:ID``."""
    if source.startswith("hub:") or source.endswith(KINDS):
        return True
    folder = Path(base_folder) / source
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def records_of(
    source: str, *, split: str = "train", base_folder: str | Path = "."
) -> Iterator[Record]:
    """The rows of a source that ``is_table`` knows, in order. Columns without a value are left out.

    Args:
        split: which part of a `datasets` folder or of a data set of the hub.

    Raises:
        ValueError: it is missing, empty or damaged, or a package is missing that reads it.
    """
    path = Path(base_folder) / source
    if source.startswith("hub:"):
        rows = _from_hub(source.removeprefix("hub:"), split)
    elif not source.endswith(KINDS):
        rows = _from_folder(path, split)
    elif not path.is_file():
        raise ValueError(f"No file {path}")
    else:
        rows = _from_csv(path) if path.suffix == ".csv" else _from_arrow(path)
    empty = True
    for row in rows:
        empty = False
        yield {key: value for key, value in row.items() if value is not None}
    if empty:
        raise ValueError(f"{source} has no rows")


def _from_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 2):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, row {number}: it has another number of cells than the first row"
                    )
                yield dict(row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV in UTF-8: {error}") from None


def _from_arrow(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow ({error}): {PACKAGE}") from None
    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = ipc.open_file(source)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            else:  # As `datasets` writes it.
                batches = iter(ipc.open_stream(source))
            for batch in batches:
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _from_folder(path: Path, split: str) -> Iterator[Record]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ValueError(f"{path} needs datasets ({error}): {PACKAGE}") from None
    try:
        found = load_from_disk(str(path))
    except Exception as error:  # The library's errors have no common class.
        raise ValueError(f"{path} cannot be read by datasets: {error}") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    yield from found


def _from_hub(name: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"hub:{name} needs datasets ({error}): {PACKAGE}") from None
    id_, _, subset = name.partition(":")
    try:
        found = load_dataset(id_, subset or None, split=split)
    except Exception as error:  # The library's errors have no common class.
        raise ValueError(
            f"hub:{name} cannot be loaded ({type(error).__name__}: {error}); give hub:OWNER/NAME "
            "or hub:OWNER/NAME:SUBSET, and its split in prompts.split"
        ) from error
    yield from found
