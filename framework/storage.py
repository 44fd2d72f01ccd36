"""Writing files so that a crash, a kill or a full disk never leaves something half-written under its final name.

Every writer goes the same way: a temporary name in the same folder, fsync, rename, fsync of the folder. The three users
are tracking.py (summary), lora/peft_io.py (exported adapters) and checkpoint.py.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import StorageError


@contextmanager
def writing(path: Path, *, change: str) -> Iterator[None]:
    """Turns a failure to write ``path`` into a StorageError that says how much room there is and what to change.

    Args:
        path: what is being written; its nearest existing parent is asked for free space.
        change: the configuration key or argument that moves the file elsewhere.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        there = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
        free_gib = shutil.disk_usage(there).free / 2**30
        raise StorageError(
            f"could not write {path}: {error} ({free_gib:.2f} GiB free there); free some space or change {change}"
        ) from error


def temporary_name(final: Path) -> Path:
    """A fresh sibling ``<name>.tmp-<8 hex digits>`` of ``final``."""
    return final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file and returns when it is on the disk. Not atomic: for files inside a temporary folder."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Like :func:`write_bytes`, for a safetensors file of contiguous tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    sync(path)


def sync(path: Path) -> None:
    """fsync of a file or a folder (a rename is durable once its folder is synced)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Writes ``path`` atomically: whoever opens it sees the old content or the new, never a part."""
    temporary = temporary_name(path)
    try:
        write_bytes(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Gives a finished folder its final name, durably. A folder that has the name already is set aside first.

    A kill between the two renames leaves the old folder as ``<name>.replaced-<8 hex digits>``, whole.
    """
    sync(temporary)
    aside = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
