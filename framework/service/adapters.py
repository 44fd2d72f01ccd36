"""What rank 0 knows of each adapter, and where its files are.

<data_dir>/registry.sqlite3
<data_dir>/adapters/<id>/snapshot-<seq>/      exact training state (one, the newest)
<data_dir>/adapters/<id>/version-<k>/         engine shards of the weights after k changes
<data_dir>/checkpoints/<id>/<kind>/<name>.<token>/
<lora_dir>/<id>/                              PEFT folder of an adapter of the simple client
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from framework.lora.spec import LoraSpec
from framework.service.ops import RequestError
from framework.service.plan import VersionKey
from framework.service.store import Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PATH = re.compile(r"tinker://([^/]+)/(weights|sampler_weights|external_weights)/([^/]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Every folder the service writes. Parts that come from clients are checked against :data:`NAME`."""

    data_dir: Path
    lora_dir: Path

    def snapshot(self, adapter_id: str, seq: int) -> Path:
        return self.data_dir / "adapters" / _safe(adapter_id) / f"snapshot-{seq}"

    def version(self, key: VersionKey) -> Path:
        return self.data_dir / "adapters" / _safe(key[0]) / f"version-{key[1]}"

    def new_checkpoint(self, adapter_id: str, kind: str, name: str) -> Path:
        """A folder of its own for every save, so that overwriting one never leaves half of two."""
        return self.data_dir / "checkpoints" / _safe(adapter_id) / kind / f"{name}.{secrets.token_hex(4)}"

    def peft(self, adapter_id: str) -> Path:
        return self.lora_dir / _safe(adapter_id)


def _safe(adapter_id: str) -> str:
    name = adapter_id.replace(":", "-")
    assert NAME.fullmatch(name), "adapter ids are made by the service"
    return name


def split_path(path: str) -> tuple[str, str, str]:
    """(adapter id, kind, name) of a ``tinker://`` path.

    Raises:
        RequestError: it is not one.
    """
    match = _PATH.fullmatch(path)
    if match is None or not NAME.fullmatch(match[3]):
        raise RequestError(f"{path!r} is not tinker://<model_id>/<weights|sampler_weights|external_weights>/<name>")
    return match[1], match[2], match[3]


def checkpoint_path(adapter_id: str, kind: str, name: str) -> str:
    """The ``tinker://`` path of a checkpoint."""
    return f"tinker://{adapter_id}/{kind}/{name}"


@dataclass(slots=True, kw_only=True)
class Adapter:
    """An adapter as the leader follows it; the row in the registry is brought up to date at each snapshot."""

    adapter_id: str
    owner: str
    tenant: str
    spec: LoraSpec
    seed: int
    simple: bool
    snapshot: str | None = None
    snapshot_seq: int = -1
    executed_seq: int = -1
    """The last request whose effect is in the trainer's state."""
    version: int = 0
    """How often the weights have changed."""
    unsaved_s: float = 0.0
    """Seconds of training that a restart would have to repeat."""
    removed: bool = False


@dataclass(slots=True, kw_only=True)
class Adapters:
    """Adapters by id, read from the registry when first asked for."""

    store: Store
    paths: Paths
    known: dict[str, Adapter] = field(default_factory=dict)

    def get(self, adapter_id: str) -> Adapter:
        """The adapter.

        Raises:
            RequestError: there is none of that name, 404.
        """
        adapter = self.known.get(adapter_id)
        if adapter is None:
            row = self.store.one("SELECT * FROM adapters WHERE adapter_id=?", adapter_id)
            if row is None:
                raise RequestError(f"there is no model {adapter_id!r}", status=404)
            adapter = self.known[adapter_id] = _from_row(row)
        if adapter.removed:
            raise RequestError(f"model {adapter_id!r} was removed", status=404)
        return adapter

    def spec(self, adapter_id: str) -> LoraSpec:
        """Its shape, also after it was removed: its versions may still be sampled."""
        row = self.store.one("SELECT spec FROM adapters WHERE adapter_id=?", adapter_id)
        assert row is not None, "adapters' rows outlive their versions"
        return spec_from_json(row["spec"])

    def saved(self, adapter: Adapter, folder: str) -> None:
        """A snapshot up to ``executed_seq`` is complete: requests until then need not be repeated."""
        old = adapter.snapshot
        adapter.snapshot, adapter.snapshot_seq, adapter.unsaved_s = folder, adapter.executed_seq, 0.0
        with self.store.transaction():
            self.store.write(
                "UPDATE adapters SET snapshot=?, snapshot_seq=?, version=?, last_used=? WHERE adapter_id=?",
                folder, adapter.snapshot_seq, adapter.version, time.time(), adapter.adapter_id,
            )  # fmt: skip
            self.store.forget_payloads(adapter.adapter_id, adapter.snapshot_seq)
        if old is not None and old != folder:
            shutil.rmtree(old, ignore_errors=True)

    def has_version(self, key: VersionKey) -> bool:
        return self.store.one("SELECT 1 FROM versions WHERE adapter_id=? AND version=?", *key) is not None

    def add_version(self, key: VersionKey) -> None:
        row = {"adapter_id": key[0], "version": key[1], "created": time.time()}
        self.store.insert("versions", row, replace=True)

    def newest_version(self, adapter_id: str) -> VersionKey | None:
        row = self.store.one("SELECT MAX(version) AS version FROM versions WHERE adapter_id=?", adapter_id)
        return None if row is None or row["version"] is None else (adapter_id, int(row["version"]))

    def checkpoint(self, path: str, owner: str, *, kind: str) -> dict[str, Any]:
        """The row of a checkpoint this owner may read.

        Raises:
            RequestError: unknown, expired, another owner's and not public (404), or of another kind.
        """
        row = self.readable_checkpoint(path, owner)
        if row["kind"] != kind:
            raise RequestError(f"{path} is of kind {row['kind']}, this needs {kind}")
        return row

    def readable_checkpoint(self, path: str, owner: str) -> dict[str, Any]:
        """Likewise, of any kind."""
        split_path(path)
        row = self.store.one("SELECT * FROM checkpoints WHERE path=?", path)
        if row is None or not (row["owner"] == owner or row["public"]):
            raise RequestError(f"there is no checkpoint {path}", status=404)
        if row["expires"] is not None and row["expires"] < time.time():
            raise RequestError(f"checkpoint {path} has expired", status=404)
        return row

    def replace_checkpoint(self, row: Mapping[str, Any]) -> None:
        """Registers a checkpoint whose files are complete; the folder of one it replaces goes."""
        old = self.store.one("SELECT * FROM checkpoints WHERE path=?", row["path"])
        self.store.insert("checkpoints", row, replace=True)
        if old is not None and old["kind"] != "sampler_weights":
            shutil.rmtree(old["info"]["folder"], ignore_errors=True)


def _from_row(row: Mapping[str, Any]) -> Adapter:
    return Adapter(
        adapter_id=row["adapter_id"],
        owner=row["owner"],
        tenant=row["tenant"],
        spec=spec_from_json(row["spec"]),
        seed=row["seed"],
        simple=bool(row["info"].get("simple")),
        snapshot=row["snapshot"],
        snapshot_seq=row["snapshot_seq"],
        executed_seq=row["snapshot_seq"],
        version=row["version"],
        removed=bool(row["removed"]),
    )


def spec_to_json(spec: LoraSpec) -> dict[str, Any]:
    """For the registry."""
    return asdict(spec)


def spec_from_json(values: Mapping[str, Any]) -> LoraSpec:
    """The inverse of :func:`spec_to_json`."""
    return LoraSpec(**{**values, "targets": tuple(values["targets"])})
