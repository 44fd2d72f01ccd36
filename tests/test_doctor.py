"""The doctor's findings: what is fine, what is not, and that each says what to do."""

from __future__ import annotations

import importlib.metadata
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from framework.device import open_device
from framework.doctor import (
    check_allocator,
    check_device,
    check_disk,
    check_ports,
    check_python,
    check_shared_memory,
    check_versions,
)

CPU = open_device("cpu", local_rank=0)


def test_this_python_is_fine() -> None:
    assert [finding.level for finding in check_python()] == ["ok"]


def test_another_version_of_torch_is_an_error_and_of_a_small_package_a_warning(tmp_path: Path) -> None:
    numpy = importlib.metadata.version("numpy")
    (tmp_path / "cpu.lock").write_text(f"numpy=={numpy}\npytest==0.1\ntorch==1.0\nno-such-package==3\n")
    ok, *rest = check_versions(tmp_path / "cpu.lock")
    assert (ok.level, ok.what) == ("ok", "1 packages are those of cpu.lock")
    assert [finding.level for finding in rest] == ["warning", "error", "warning"]
    assert rest[2].what == "no-such-package is missing, cpu.lock has 3"
    assert all("make env" in finding.advice for finding in rest)


def test_a_taken_port_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (taken,) = check_ports((port,))
    assert taken.level == "warning"
    assert f"port {port} is taken" in taken.what
    assert "--master_port" in taken.advice
    assert [finding.level for finding in check_ports((port,))] == ["ok"]


@pytest.mark.parametrize(
    ("value", "shares", "level"),
    [
        ("expandable_segments:True", True, "error"),
        ("max_split_size_mb:64, expandable_segments: true", True, "error"),
        ("expandable_segments:True", False, "ok"),
        ("expandable_segments:False", True, "ok"),
    ],
)
def test_expandable_segments_do_not_go_with_the_engines_sleep(value: str, shares: bool, level: str) -> None:
    (finding,) = check_allocator({"PYTORCH_CUDA_ALLOC_CONF": value}, replace(CPU, shares_weights=shares))
    assert finding.level == level
    assert ("unset PYTORCH_CUDA_ALLOC_CONF" in finding.advice) == (level == "error")


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert [finding.level for finding in check_device(CPU)] == ["ok", "warning"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [finding.level for finding in check_device(CPU)] == ["ok"]


def test_places_need_room(tmp_path: Path) -> None:
    (finding,) = check_disk({"runs": tmp_path / "not" / "yet" / "there"})
    assert str(tmp_path) in finding.what
    assert check_shared_memory(tmp_path / "nothing")[0].level == "warning"
