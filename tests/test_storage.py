"""Atomic, durable writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framework import storage
from framework.errors import StorageError


def test_replace_file_keeps_the_old_content_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    storage.replace_file(path, b"old")
    with pytest.raises(TypeError):
        storage.replace_file(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    storage.replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_write_names_the_file_the_room_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.json"
    with (
        pytest.raises(StorageError, match=r"x\.json.*GiB free there.*change run_dir"),
        storage.writing(path, change="run_dir"),
    ):
        storage.write_bytes(path, b"")


def test_safetensors_failures_are_storage_errors_too(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "x.safetensors"
    with pytest.raises(StorageError, match=r"x\.safetensors"), storage.writing(path, change="checkpoint.folder"):
        storage.write_tensors(path, {"a": torch.ones(2)})


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    written = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.randn(4).bfloat16()}
    storage.write_tensors(tmp_path / "x.safetensors", written)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
