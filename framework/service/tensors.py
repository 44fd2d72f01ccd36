"""Tensors on disk: exact adapter states and engine shards per rank, and PEFT folders. Safetensors only, never pickle.

<folder>/state-rank0.safetensors      masters, Adam moments, gradient, step count of one rank
<folder>/shards-rank0.safetensors     what the engine's slot of one rank holds
<folder>/adapter_model.safetensors    whole fp32 factors with PEFT's names
<folder>/adapter_config.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.errors import CheckpointError
from framework.trainer.base import LoraShard


def write_state(folder: Path, rank: int, state: Mapping[str, Tensor]) -> None:
    """Writes what :meth:`Trainer.state_dict` gave."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"state-rank{rank}.safetensors", dict(state))


def read_state(folder: Path, rank: int) -> dict[str, Tensor]:
    """Reads it back; CheckpointError if the file is missing or damaged."""
    return _read(folder / f"state-rank{rank}.safetensors")


def copied(shards: Mapping[str, LoraShard]) -> dict[str, LoraShard]:
    """The same values in one new allocation: what a trainer goes on to change can still be written."""
    factors = [factor for shard in shards.values() for factor in (shard.a, shard.b)]
    flat = torch.cat([factor.reshape(-1) for factor in factors])
    parts = iter(flat.split([factor.numel() for factor in factors]))
    return {name: LoraShard(a=next(parts).view_as(s.a), b=next(parts).view_as(s.b)) for name, s in shards.items()}


def write_shards(folder: Path, rank: int, shards: Mapping[str, LoraShard]) -> None:
    """Writes what :meth:`Trainer.adapter_shards` gave, as CPU tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shard in shards.items():
        tensors[f"{name}.a"] = shard.a.detach().cpu().contiguous()
        tensors[f"{name}.b"] = shard.b.detach().cpu().contiguous()
    _replace(folder / f"shards-rank{rank}.safetensors", tensors, {"modules": json.dumps(list(shards))})


def read_shards(folder: Path, rank: int) -> dict[str, LoraShard]:
    """Reads them back in their order; CheckpointError if the file is missing or damaged."""
    path = folder / f"shards-rank{rank}.safetensors"
    tensors = _read(path)
    with safe_open(path, framework="pt") as file:  # the format sorts tensors by name
        modules = json.loads(file.metadata()["modules"])
    return {name: LoraShard(a=tensors[f"{name}.a"], b=tensors[f"{name}.b"]) for name in modules}


def has_shards(folder: Path, num_ranks: int) -> bool:
    """Whether every rank has written its shards."""
    return all((folder / f"shards-rank{rank}.safetensors").is_file() for rank in range(num_ranks))


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
