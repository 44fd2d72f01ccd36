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

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.errors import CheckpointError
from framework.lora.spec import TARGETS, LoraSpec
from framework.trainer.base import LoraShard

_PEFT_PREFIX = "base_model.model."


def write_state(folder: Path, rank: int, state: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"state-rank{rank}.safetensors", dict(state))


def read_state(folder: Path, rank: int) -> dict[str, Tensor]:
    return _read(folder / f"state-rank{rank}.safetensors")


def write_shards(folder: Path, rank: int, shards: Mapping[str, LoraShard]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shard in shards.items():
        tensors[f"{name}.a"] = shard.a.detach().cpu().contiguous()
        tensors[f"{name}.b"] = shard.b.detach().cpu().contiguous()
    _replace(folder / f"shards-rank{rank}.safetensors", tensors)


def read_shards(folder: Path, rank: int) -> dict[str, LoraShard]:
    tensors = _read(folder / f"shards-rank{rank}.safetensors")
    names = [key.removesuffix(".a") for key in tensors if key.endswith(".a")]
    return {name: LoraShard(a=tensors[f"{name}.a"], b=tensors[f"{name}.b"]) for name in names}


def write_peft(folder: Path, spec: LoraSpec, tensors: Mapping[str, npt.NDArray[np.float32]], base_model: str) -> None:
    """Writes a folder that ``peft.PeftModel.from_pretrained`` reads; each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": list(spec.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    named = {_PEFT_PREFIX + name: np.ascontiguousarray(array) for name, array in tensors.items()}
    partial = folder / "adapter_model.safetensors.partial"
    save_numpy(named, partial, metadata={"format": "pt"})
    partial.replace(folder / "adapter_model.safetensors")
    partial = folder / "adapter_config.json.partial"
    partial.write_text(json.dumps(config, indent=2))
    partial.replace(folder / "adapter_config.json")


def read_peft_spec(folder: Path) -> LoraSpec:
    """The shape of a PEFT adapter.

    Raises:
        CheckpointError: no or a damaged adapter_config.json, or an option that is not supported.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        targets = config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} is missing or damaged: {error}") from error
    if isinstance(targets, str):
        targets = list(TARGETS) if targets == "all-linear" else [targets]
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "layers_to_transform"):
        if config.get(key):
            raise CheckpointError(f"{path.name}: {key}={config[key]!r} is not supported")
    return LoraSpec(rank=rank, alpha=alpha, targets=tuple(targets), use_rslora=bool(config.get("use_rslora", False)))


def read_peft(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Whole factors, named without PEFT's prefix.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_numpy(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name} is missing or damaged: {error}") from error
    return {name.removeprefix(_PEFT_PREFIX): array.astype(np.float32) for name, array in tensors.items()}


def folder_size(folder: Path) -> int:
    """Bytes of the files directly in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
