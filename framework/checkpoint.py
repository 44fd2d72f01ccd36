"""Checkpoints on disk: every rank's tensors, what the run knows besides, and the configuration they belong to.

    checkpoints/
      step_000012/              complete, always: it got its name by one rename, after everything in it was synced
        rank_00000.safetensors  one per rank
        meta.json               data position, version counter, tracker run id, ...: whatever the recipe gave
        config.json             the run's flattened configuration
        MANIFEST.json           size and sha256 of each file above
      step_000015.tmp-1f2e3d4c  being written; removed at the next start
      step_000012.replaced-...  set aside while the same step is written again; put back or removed at the next start
      step_000020.rewound-...   a later step of a run that was resumed from an earlier one; kept, never resumed from

A kill at any instruction leaves the newest complete folder as it was. This file knows nothing of trainers and recipes;
what goes in is theirs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from framework import storage
from framework.errors import CheckpointError, ConfigError, FrameworkError

T = TypeVar("T")

MAY_DIFFER = ("num_steps", "run_dir", "resume", "tracking.*", "checkpoint.*", "hydra.*")
"""Patterns of configuration keys that a resumed run may change: its length, and where things go."""

_MANIFEST, _META, _CONFIG = "MANIFEST.json", "meta.json", "config.json"
_COMPLETE = re.compile(r"step_(\d{6,})")
_TEMPORARY = re.compile(r"step_\d{6,}\.tmp-[0-9a-f]{8}")
_REPLACED = re.compile(r"(step_\d{6,})\.replaced-[0-9a-f]{8}")


class Ranks(Protocol):
    """The part of :class:`framework.distributed.Mesh` that is needed here."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What :meth:`CheckpointStore.load` gives back."""

    step: int
    state: Mapping[str, Tensor]
    """This rank's tensors."""
    meta: Mapping[str, Any]
    """The same on every rank."""


class CheckpointStore:
    """A folder of checkpoints that all ranks see. Every method, and making one, is collective over all ranks."""

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks) -> None:
        """Opens the folder, makes it if missing, and clears what a killed run left unfinished.

        Args:
            folder: on a file system that all ranks share.
            keep: how many checkpoints, newest first, survive a save.
            ranks: of this run.

        Raises:
            ConfigError: ``keep`` is below 1.
            StorageError: the folder cannot be made or cleared.
        """
        if keep < 1:
            raise ConfigError(f"checkpoint.keep={keep}: must be at least 1")
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        with self._agreed():
            if ranks.rank == 0:
                with storage.writing(folder, change="run_dir"):
                    self._clear()

    def save(
        self, step: int, state: Mapping[str, Tensor], *, meta: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Path:
        """Writes a checkpoint and prunes older ones.

        Args:
            step: the last step that is in it; an existing checkpoint of the same step is replaced.
            state: this rank's tensors, on any device.
            meta: JSON values; rank 0's are written.
            config: dotted key to JSON value; rank 0's is written.

        Returns:
            The folder, complete and on disk.

        Raises:
            StorageError: on every rank when one of them cannot write; the older checkpoints are untouched.
        """
        final = self._folder / f"step_{step:06d}"
        temporary = self._ranks.all_gather(storage.temporary_name(final))[0]
        try:
            with self._agreed(), storage.writing(temporary, change="run_dir"):
                if self._ranks.rank == 0:
                    temporary.mkdir()
            with self._agreed(), storage.writing(temporary, change="run_dir"):
                path = temporary / _rank_file(self._ranks.rank)
                storage.write_tensors(path, state)
                entry = _entry(path)
            entries = {_rank_file(rank): e for rank, e in enumerate(self._ranks.all_gather(entry))}
            with self._agreed(), storage.writing(temporary, change="run_dir"):
                if self._ranks.rank == 0:
                    self._complete(temporary, final, entries, meta=meta, config=config)
        except BaseException:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        with self._agreed(), storage.writing(self._folder, change="run_dir"):
            if self._ranks.rank == 0:
                self._prune(step)
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint's folder, or None; the same on every rank. Whether it is sound, :meth:`load` says."""
        newest: Path | None = None
        with self._agreed():
            if self._ranks.rank == 0:
                newest = next(reversed(self._steps().values()), None)
        return self._ranks.all_gather(newest)[0]

    def load(self, path: Path, *, config: Mapping[str, Any]) -> Checkpoint:
        """Reads a checkpoint of this very run.

        Args:
            path: a folder that :meth:`save` or :meth:`latest` gave.
            config: of the run that resumes, like :meth:`save`'s.

        Raises:
            CheckpointError: on every rank, when a file is missing or damaged on one of them, when the checkpoint is of
                another number of ranks, or of another configuration; the message names the file, or the keys with
                both values.
        """
        with self._agreed():
            files = self._verify(path)
            _compare(json.loads(files[_CONFIG]), config, path)
            try:
                state = load_tensors(files[_rank_file(self._ranks.rank)])
            except SafetensorError as error:
                raise CheckpointError(f"{path / _rank_file(self._ranks.rank)} is damaged: {error}") from error
        return Checkpoint(step=int(path.name.removeprefix("step_")), state=state, meta=json.loads(files[_META]))

    def _clear(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.iterdir()):
            replaced = _REPLACED.fullmatch(path.name)
            if replaced and not (self._folder / replaced[1]).exists():
                path.rename(self._folder / replaced[1])
            elif replaced or _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)
        storage.sync(self._folder)

    def _steps(self) -> dict[int, Path]:
        """Complete checkpoints, oldest first."""
        named = {path: _COMPLETE.fullmatch(path.name) for path in self._folder.iterdir()}
        steps = {int(match[1]): path for path, match in named.items() if match}
        return dict(sorted(steps.items()))

    def _complete(
        self,
        temporary: Path,
        final: Path,
        entries: dict[str, dict[str, Any]],
        *,
        meta: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """Rank 0, when every rank's file is on disk: the JSON files, the manifest, the final name."""
        for name, entry in entries.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise OSError(f"{name} is not visible to rank 0: all ranks must share this file system")
        for name, content in ((_META, meta), (_CONFIG, config)):
            storage.write_bytes(temporary / name, _json(dict(content)))
            entries[name] = _entry(temporary / name)
        storage.write_bytes(temporary / _MANIFEST, _json(entries))
        storage.publish_folder(temporary, final)

    def _prune(self, step: int) -> None:
        """Keeps the newest up to ``step``. Later ones are of a future that this run has left; they are set aside."""
        steps = self._steps()
        for later in [s for s in steps if s > step]:
            path = steps.pop(later)
            path.rename(path.with_name(f"{path.name}.rewound-{secrets.token_hex(4)}"))
        for old in list(steps)[: -self._keep]:
            doomed = storage.temporary_name(steps[old])
            steps[old].rename(doomed)  # first, so that no folder with a final name is ever in part removed
            shutil.rmtree(doomed)

    def _verify(self, path: Path) -> dict[str, bytes]:
        """The content of this rank's files, checked. Other ranks' files must be there; each rank reads its own."""
        advice = f"; remove {path} to resume from an older checkpoint"
        try:
            text = (path / _MANIFEST).read_bytes()
            entries = json.loads(text)
            sizes = {name: entry["bytes"] for name, entry in entries.items()}
            if text != _json(entries):
                raise ValueError("not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / _MANIFEST} is missing or damaged: {error}{advice}") from error
        world_size = sum(name.startswith("rank_") for name in entries)
        if world_size != self._ranks.world_size:
            raise CheckpointError(
                f"{path} was written by {world_size} ranks, this run has {self._ranks.world_size}; "
                f"resume with torchrun --nproc_per_node and nodes as before"
            )
        for name, size in sizes.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise CheckpointError(
                    f"{path / name} " + ("is missing" if found is None else f"has {found} bytes, not {size}") + advice
                )
        files = {}
        for name in (_META, _CONFIG, _rank_file(self._ranks.rank)):
            try:
                files[name] = (path / name).read_bytes()
                sound = hashlib.sha256(files[name]).hexdigest() == entries[name]["sha256"]
            except (OSError, KeyError) as error:
                raise CheckpointError(f"{path / name} cannot be read: {error!r}{advice}") from error
            if not sound:
                raise CheckpointError(f"{path / name} is damaged: its sha256 is not the manifest's{advice}")
        return files

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """Raises on every rank when the block raised on one of them; the block must not end in a collective."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - raised again below, after the others know
            error = caught
        kind = type(error) if isinstance(error, FrameworkError) else FrameworkError
        outcomes = self._ranks.all_gather(None if error is None else (kind, str(error)))
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                raise outcome[0](f"on rank {rank}: {outcome[1]}")


def rng_state() -> dict[str, Tensor]:
    """The states of Python's, numpy's and torch's global host generators, as tensors named ``rng.*``."""
    _, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    words_and_place = [*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"], numpy_state["has_gauss"]]
    return {
        "rng.python": torch.tensor(words, dtype=torch.int64),
        "rng.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng.numpy": torch.tensor(words_and_place, dtype=torch.int64),
        "rng.numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`rng_state`; other entries of ``state`` are ignored.

    Raises:
        CheckpointError: an entry is missing.
    """
    missing = sorted(rng_state().keys() - state.keys())
    if missing:
        raise CheckpointError(f"the checkpoint has no random state: {missing} are missing")
    gauss = state["rng.python_gauss"].tolist()
    random.setstate((3, tuple(state["rng.python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["rng.numpy"].tolist()
    cached = state["rng.numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["rng.torch"])


def _compare(saved: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Refuses another configuration than the saved one, :data:`MAY_DIFFER` aside."""
    texts = [{key: json.dumps(value, sort_keys=True) for key, value in config.items()} for config in (saved, given)]
    lines = [
        f"  {key}: the checkpoint has {texts[0].get(key, 'no such key')}, this run {texts[1].get(key, 'no such key')}"
        for key in sorted(texts[0].keys() | texts[1].keys())
        if texts[0].get(key) != texts[1].get(key) and not any(fnmatch.fnmatchcase(key, free) for free in MAY_DIFFER)
    ]
    if lines:
        raise CheckpointError(
            f"{path} is of another configuration:\n"
            + "\n".join(lines)
            + "\nset these keys back, or start a new run_dir"
        )


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
