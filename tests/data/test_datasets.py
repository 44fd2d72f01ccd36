"""Data sets: rows by number from JSONL and Parquet, errors with file and row, and the hub's converted files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from framework.data.datasets import JsonLines, Parquet, choose_files, open_rows
from framework.errors import DataError


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_parquet(path: Path, rows: list[dict[str, object]], *, row_group_size: int = 2) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_jsonl_rows_by_number(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", '{"q": "ä"}', "", '{"q": 2}', "   ", '{"q": [3]}')
    rows = open_rows(str(file))
    assert len(rows) == 3
    assert [rows[index] for index in (2, 0, 1)] == [{"q": [3]}, {"q": "ä"}, {"q": 2}]
    assert rows.where(2) == f"{file}, row 5"
    assert rows.blocks is None


def test_a_last_line_without_an_end_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": 1}\n{"q": 2}')
    assert open_rows(str(file))[1] == {"q": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": 1', "is not valid JSON"),
        ("[1]", "must be a JSON object, is a list"),
        ('"x"', "must be a JSON object, is a str"),
        ('{"q": "\\ud8', "is not valid JSON"),
    ],
)
def test_a_malformed_row_names_file_and_row(tmp_path: Path, line: str, message: str) -> None:
    rows = open_rows(str(write_lines(tmp_path / "a.jsonl", '{"q": 1}', "", line)))
    assert rows[0] == {"q": 1}
    with pytest.raises(DataError, match=rf"a\.jsonl, row 3: {message}"):
        rows[1]


def test_bytes_that_are_no_text_name_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"q": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"row 1: is not valid JSON"):
        open_rows(str(file))[0]


def test_parquet_rows_by_number_over_files_and_row_groups(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [{"q": i, "m": [{"role": "user"}]} for i in range(5)])
    write_parquet(tmp_path / "train-1.parquet", [{"q": i, "m": []} for i in range(5, 8)])
    rows = open_rows(str(tmp_path))
    assert len(rows) == 8
    assert [rows[index]["q"] for index in (7, 0, 4, 5, 2)] == [7, 0, 4, 5, 2]
    assert rows[3]["m"] == [{"role": "user"}]
    assert rows.blocks == [2, 2, 1, 2, 1]
    assert rows.where(7) == f"{tmp_path / 'train-1.parquet'}, row 3"
    with pytest.raises(IndexError):
        rows[8]


def test_the_parquet_cache_is_bounded(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"q": i} for i in range(40)], row_group_size=4)
    rows = Parquet([file], cached_rows=8)
    assert [rows[index]["q"] for index in range(0, 40, 3)] == list(range(0, 40, 3))
    assert len(rows._cache) == 2


def test_a_large_jsonl_file_is_not_read_into_memory(tmp_path: Path) -> None:
    line = json.dumps({"q": "x" * 10_000}) + "\n"
    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        out.writelines(line for _ in range(2000))  # 20 MB
    tracemalloc.start()
    rows = JsonLines([file])
    assert rows[1999]["q"] == "x" * 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-a.jsonl", '{"q": 1}')
    write_lines(tmp_path / "train-b.jsonl", '{"q": 2}')
    write_lines(tmp_path / "test.jsonl", '{"q": 3}')
    assert [open_rows(str(tmp_path))[i]["q"] for i in range(2)] == [1, 2]
    assert open_rows(str(tmp_path), split="test")[0] == {"q": 3}
    with pytest.raises(DataError, match=r"the folder has no dev\*\.jsonl"):
        open_rows(str(tmp_path), split="dev")


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        open_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="there is not one row in it"):
        open_rows(str(write_lines(tmp_path / "empty.jsonl", "", "  ")))
    with pytest.raises(DataError, match=r"bad\.parquet: is not a readable Parquet file"):
        open_rows(str(write_lines(tmp_path / "bad.parquet", "hello")))
    with pytest.raises(DataError, match=r"all \.jsonl or all \.parquet"):
        open_rows(str(write_lines(tmp_path / "a.csv", "a,b")))


def test_hub_files_are_chosen_by_configuration_and_split() -> None:
    one = ["default/train/0001.parquet", "default/train/0000.parquet", "default/test/0000.parquet", "README.md"]
    assert choose_files("a/b", one, split="train", config=None) == one[1::-1]
    two = ["main/test/0000.parquet", "socratic/test/0000.parquet"]
    assert choose_files("a/b", two, split="test", config="main") == two[:1]
    with pytest.raises(DataError, match=r"name one of its configurations \['main', 'socratic'\]"):
        choose_files("a/b", two, split="test", config=None)
    with pytest.raises(DataError, match=r"no split 'dev' of the configuration 'main'.*splits of this one: \['test'\]"):
        choose_files("a/b", two, split="dev", config="main")
