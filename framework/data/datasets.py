"""Rows of a data set by number: local JSONL and Parquet files of any size, and data sets of the hub.

Nothing is held in memory but where each row lies: a JSONL file is read at the row's offset, a Parquet file by row
group through a small cache. Order and resuming are in :mod:`framework.data.order`, what a row means is in
:mod:`framework.data.supervised` and in the environments.
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from framework.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Row = Mapping[str, object]

CACHED_ROWS = 131_072
"""Rows of Parquet row groups that are kept decoded; twice the pool that order.py shuffles within."""
SUFFIXES = (".jsonl", ".parquet")
PARQUET_REVISION = "refs/convert/parquet"
"""Where the hub keeps every data set in Parquet form."""
HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer the first question before it counts as absent."""


class Rows(Protocol):
    """A data set. Reading is safe from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
            DataError: it is malformed; names the file and the row.
        """

    def where(self, index: int) -> str:
        """File and row number from 1, for messages, e.g. ``train.jsonl, row 18``."""

    @property
    def blocks(self) -> Sequence[int] | None:
        """Lengths of the runs of rows that are cheap to read together; None when every row is as cheap."""


def open_rows(name: str, *, split: str = "train", config: str | None = None) -> Rows:
    """Opens a data set.

    Args:
        name: a ``.jsonl`` or ``.parquet`` file, a folder that holds ``<split>*.jsonl`` or ``<split>*.parquet``, or a
            hub name such as ``openai/gsm8k``.
        split: which files of a folder, or which split of a hub data set.
        config: which configuration of a hub data set; None where it has one only.

    Raises:
        DataError: no such file, no such split, not the right format, or no rows.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.name.startswith(split))
        if not files:
            raise DataError(f"data {name}: the folder has no {split}*.jsonl and no {split}*.parquet")
        return _open_files(files)
    if path.is_file() or path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
        return _open_files([path])
    return _open_files(_fetch(name, split=split, config=config))


def _open_files(files: Sequence[Path]) -> Rows:
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= set(SUFFIXES):
        names = [file.name for file in files]
        raise DataError(f"data {files[0].parent}: {names}: files must be all .jsonl or all .parquet")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(f"data {missing[0]}: there is no such file")
    rows: Rows = JsonLines(files) if suffixes == {".jsonl"} else Parquet(files)
    if not len(rows):
        raise DataError(f"data {', '.join(map(str, files))}: there is not one row in it")
    return rows


class JsonLines:
    """One JSON object per line; blank lines are skipped. A row's number is its line's."""

    blocks = None

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._descriptors = [os.open(file, os.O_RDONLY) for file in files]
        self._file, self._line, self._start, self._length = array("i"), array("q"), array("q"), array("q")
        for number, file in enumerate(files):
            offset = 0
            with file.open("rb") as lines:
                for line_number, line in enumerate(lines, start=1):
                    if not line.isspace():
                        self._file.append(number)
                        self._line.append(line_number)
                        self._start.append(offset)
                        self._length.append(len(line))
                    offset += len(line)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", []):
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> Row:
        text = os.pread(self._descriptors[self._file[index]], self._length[index], self._start[index])
        try:
            row = json.loads(text)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise DataError(f"{self.where(index)}: is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: must be a JSON object, is a {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        return f"{self._files[self._file[index]]}, row {self._line[index]}"


class Parquet:
    """Parquet files, one after the other, read by row group."""

    def __init__(self, files: Sequence[Path], *, cached_rows: int = CACHED_ROWS) -> None:
        import pyarrow
        import pyarrow.parquet

        self._files = list(files)
        self._cached_rows = cached_rows
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._readers: list[pyarrow.parquet.ParquetFile] = []
        self._groups: list[tuple[int, int]] = []
        self.blocks: list[int] = []
        for number, file in enumerate(files):
            try:
                reader = pyarrow.parquet.ParquetFile(file, memory_map=True)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file}: is not a readable Parquet file ({error})") from error
            self._readers.append(reader)
            for group in range(reader.metadata.num_row_groups):
                self._groups.append((number, group))
                self.blocks.append(reader.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(self.blocks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        block, offset = self._locate(index)
        row: Row = self._table(block, index).slice(offset, 1).to_pylist()[0]
        return row

    def where(self, index: int) -> str:
        block, offset = self._locate(index)
        number, _ = self._groups[block]
        before = sum(
            length for length, (file, _) in zip(self.blocks[:block], self._groups, strict=False) if file == number
        )
        return f"{self._files[number]}, row {before + offset + 1}"

    def _locate(self, index: int) -> tuple[int, int]:
        """The block and the place in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = bisect_right(self._ends, index)
        return block, index - (self._ends[block - 1] if block else 0)

    def _table(self, block: int, index: int) -> pyarrow.Table:
        import pyarrow

        with self._lock:
            if block not in self._cache:
                number, group = self._groups[block]
                try:
                    self._cache[block] = self._readers[number].read_row_group(group)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(f"{self.where(index)}: its row group cannot be read ({error})") from error
                while len(self._cache) > 1 and sum(self.blocks[kept] for kept in self._cache) > self._cached_rows:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(block)
            return self._cache[block]


def _fetch(name: str, *, split: str, config: str | None) -> list[Path]:
    """Downloads a split of a hub data set in the Parquet form that the hub keeps of every data set.

    Those files are at the revision ``refs/convert/parquet`` as ``<config>/<split>/0000.parquet``. Where the hub does
    not answer, what was downloaded before is taken.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library that the client uses
    fetch = partial(snapshot_download, name, repo_type="dataset", revision=PARQUET_REVISION)
    try:
        info = HfApi().dataset_info(name, revision=PARQUET_REVISION, timeout=HUB_TIMEOUT_S)
        chosen = choose_files(name, [file.rfilename for file in info.siblings or ()], split=split, config=config)
        folder = Path(fetch(allow_patterns=chosen))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise DataError(
            f"data {name}: it is no file or folder here, and the hub has no such data set ({error}); "
            "a private one needs HF_TOKEN"
        ) from error
    except (transport_error, OfflineModeIsEnabled, OSError) as error:
        try:
            folder = Path(fetch(local_files_only=True, allow_patterns=[f"{config or '*'}/{split}/*.parquet"]))
        except (LocalEntryNotFoundError, OSError):
            raise DataError(
                f"data {name}: it is no file or folder here, split {split!r} was not downloaded before, and no hub "
                f"answers ({error}). HF_ENDPOINT, HF_HUB_OFFLINE and the network decide that"
            ) from error
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet")]
        chosen = choose_files(name, files, split=split, config=config)
    return [folder / file for file in chosen]


def choose_files(name: str, files: Sequence[str], *, split: str, config: str | None) -> list[str]:
    """Of a data set's converted files those of one split.

    Raises:
        DataError: no such configuration or split, or several configurations and none named.
    """
    parquet = [file.split("/") for file in files if file.endswith(".parquet") and file.count("/") == 2]
    configs = sorted({parts[0] for parts in parquet})
    if config is None:
        if len(configs) != 1:
            raise DataError(f"data {name}: name one of its configurations {configs} (environment or data: config)")
        config = configs[0]
    chosen = sorted("/".join(parts) for parts in parquet if parts[:2] == [config, split])
    if not chosen:
        splits = sorted({parts[1] for parts in parquet if parts[0] == config})
        raise DataError(
            f"data {name}: there is no split {split!r} of the configuration {config!r}; "
            f"configurations: {configs}, splits of this one: {splits}"
        )
    return chosen
