"""Adapters as PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read.

What is written loads with ``peft.PeftModel.from_pretrained`` and in stock vLLM. What is read may come from PEFT itself,
as long as it is plain LoRA on the projections of the layout table; everything else is refused by the name of the field.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from framework import storage
from framework.errors import AdapterError, StorageError
from framework.lora.spec import TARGETS, LoraSpec

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+\.(?P<target>\w+))\.lora_(?P<factor>[AB])\.weight")
_UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "peft_type", "task_type", "init_lora_weights"}
)
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core"}
    | {"qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}
    | {"layers_pattern", "exclude_modules"}
)
"""Fields of a PEFT config that change nothing about weights that are already trained and saved."""
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Initialisations that leave the saved base weights as they were; PiSSA, OLoRA, CorDA and LoftQ change them."""


def save_peft(
    folder: Path,
    *,
    spec: LoraSpec,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    base_model: str,
    dtype: torch.dtype,
) -> None:
    """Writes an adapter folder atomically: ``folder`` is the old adapter or the whole new one, never a part.

    Args:
        tensors: ``<module path>.lora_A.weight`` ``[rank, in]`` and ``.lora_B.weight`` ``[out, rank]`` for every
            module, unscaled, as :meth:`framework.trainer.base.Trainer.export_adapter` gives them.
        base_model: hub name or folder of the base model, for PEFT's ``base_model_name_or_path``.
        dtype: of the tensors in the file.

    Raises:
        AdapterError: the tensors are not those of ``spec``.
        StorageError: the folder cannot be written, or is something else than an adapter.
    """
    check_factors(spec, tensors)
    _refuse_foreign(folder)
    temporary = storage.temporary_name(folder)
    try:
        with storage.writing(folder, change="the folder to export to"):
            temporary.mkdir(parents=True)
            config = json.dumps(peft_config(spec, base_model), indent=2, sort_keys=True) + "\n"
            storage.write_bytes(temporary / CONFIG_FILE, config.encode())
            named = {_PREFIX + name: torch.from_numpy(tensors[name]).to(dtype) for name in sorted(tensors)}
            storage.write_tensors(temporary / TENSORS_FILE, named, metadata={"format": "pt"})
            storage.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_peft(folder: Path) -> tuple[LoraSpec, dict[str, npt.NDArray[np.float32]]]:
    """Reads an adapter folder made by :func:`save_peft` or by PEFT.

    Returns:
        The spec and the unscaled factors in float32, named as :func:`save_peft` takes them.

    Raises:
        AdapterError: a file is missing or damaged, or the adapter is not plain LoRA on :data:`TARGETS`.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    modules = config.get("target_modules") or []
    names = [modules] if isinstance(modules, str) else list(modules)
    if isinstance(modules, str):  # a pattern; the tensors tell what it matched
        names = [name.rsplit(".lora_", 1)[0] for name in tensors]
    targets = {str(name).rsplit(".", 1)[-1] for name in names}
    if not targets or not targets <= set(TARGETS):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: target_modules={sorted(names)}: every entry must end in one of {list(TARGETS)}"
        )
    if not isinstance(config.get("r"), int):
        raise AdapterError(f"{folder / CONFIG_FILE}: r={config.get('r')!r}: must be an integer")
    try:
        spec = LoraSpec(
            rank=config["r"],
            alpha=float(config.get("lora_alpha", 8)),
            targets=tuple(targets),
            dropout=float(config.get("lora_dropout", 0.0)),
            use_rslora=bool(config.get("use_rslora", False)),
        )
        check_factors(spec, tensors)
    except (AdapterError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {error}") from error
    return spec, tensors


def peft_config(spec: LoraSpec, base_model: str) -> dict[str, Any]:
    """The content of ``adapter_config.json``, made by PEFT's own class; sets become sorted lists."""
    from peft import LoraConfig

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,  # type: ignore[arg-type]
        target_modules=list(spec.targets),
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def check_factors(spec: LoraSpec, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Checks that the tensors are A and B pairs of the spec's rank, for the spec's targets and no other.

    Raises:
        AdapterError: names the tensor and the shape or target it should have.
    """
    targets = set()
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None or match["target"] not in TARGETS:
            raise AdapterError(
                f"tensor {name!r} is not <module path>.lora_A.weight or .lora_B.weight of one of {list(TARGETS)}"
            )
        targets.add(match["target"])
        other = f"{match['module']}.lora_{'B' if match['factor'] == 'A' else 'A'}.weight"
        if other not in tensors:
            raise AdapterError(f"tensor {name!r} is there without {other!r}")
        rank_axis = 0 if match["factor"] == "A" else 1
        if tensor.ndim != 2 or tensor.shape[rank_axis] != spec.rank:
            wanted = f"[{spec.rank}, in]" if match["factor"] == "A" else f"[out, {spec.rank}]"
            raise AdapterError(f"tensor {name!r} has shape {list(tensor.shape)}; rank {spec.rank} needs {wanted}")
    if targets != set(spec.targets):
        raise AdapterError(f"the tensors are for {sorted(targets)}, the adapter's targets are {sorted(spec.targets)}")


def _refuse_foreign(folder: Path) -> None:
    """An export may replace an adapter, nothing else."""
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{folder} exists and is not an adapter; remove it or choose another folder to export to")


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a plain LoRA adapter: a field we do not know must have PEFT's default or be empty."""
    from peft import LoraConfig

    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not a readable PEFT adapter config: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: must be a JSON object")
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "init_lora_weights": _PLAIN_INITS,
    }
    defaults = {f.name: f.default for f in fields(LoraConfig) if f.default is not MISSING}
    for name, value in config.items():
        if name in allowed:
            plain = value in allowed[name]
        else:
            plain = name in _UNDERSTOOD | _WITHOUT_EFFECT or not value or value == defaults.get(name)
        if not plain:
            wanted = list(allowed.get(name, (defaults.get(name),)))
            raise AdapterError(f"{path}: {name}={value!r} cannot be served; only {wanted} can (plain LoRA)")
    if "peft_type" not in config:
        raise AdapterError(f"{path}: peft_type is missing; it must be LORA")
    return config


def _read_tensors(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    path = folder / TENSORS_FILE
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; an adapter is read from safetensors only")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: damaged or unreadable: {error}") from error
    alien = [name for name in tensors if not name.startswith(_PREFIX)]
    if alien or not tensors:
        raise AdapterError(
            f"{path}: tensor names must start with {_PREFIX!r}; got {alien[:3]} of {len(tensors)} tensors"
        )
    return {name.removeprefix(_PREFIX): tensor.float().numpy() for name, tensor in tensors.items()}
