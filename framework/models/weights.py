"""Reads a rank's shard of a safetensors checkpoint: only the bytes of the shard are touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.errors import ModelError
from framework.models.layout import LM_HEAD, Entry, Split, entries
from framework.models.spec import ModelSpec


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each HF tensor, from the index of a sharded checkpoint or from the single file.

    Raises:
        ModelError: there are no weights, or the index or a file is damaged or missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index} is damaged: {error}; fetch the model again") from error
        missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if missing:
            raise ModelError(f"{folder} lacks {missing}, named in {index.name}; fetch the model again")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    if not single.exists():
        raise ModelError(f"model.name_or_path={folder}: there is no model.safetensors and no {index.name} in it")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except SafetensorError as error:
        raise ModelError(f"{single} is damaged: {error}; fetch the model again") from error


def load_shard(
    folder: Path, spec: ModelSpec, *, tp_rank: int, tp_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """This rank's parameters, by the layout's names.

    Args:
        folder: HF checkpoint, one file or sharded.
        spec: of the same folder.
        tp_rank: in [0, tp_size).
        tp_size: divides the model, see :meth:`ModelSpec.check_tensor_parallel`.
        dtype: of the result; the file's values are converted.
        device: where the result lives.

    Raises:
        ModelError: a tensor or file is missing, damaged, unknown, or of another shape than config.json says.
    """
    files = tensor_files(folder)
    _check_all_used(files, spec, folder)
    shard: dict[str, Tensor] = {}
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        try:
            for path in sorted(set(files.values())):
                handles[path] = stack.enter_context(safe_open(path, framework="pt"))
            for entry in entries(spec):
                slices = {name: _slice(handles, files, name, folder) for name in entry.sources}
                local = _read(entry, slices, spec, tp_rank=tp_rank, tp_size=tp_size)
                shard[entry.name] = local.to(device=device, dtype=dtype)
        except SafetensorError as error:
            raise ModelError(f"{folder}: the weights are damaged: {error}; fetch the model again") from error
    return shard


def _check_all_used(files: Mapping[str, Path], spec: ModelSpec, folder: Path) -> None:
    """Refuses a checkpoint with weights that this model would ignore, e.g. scales or biases."""
    used = {source for entry in entries(spec) for source in entry.sources}
    harmless = {LM_HEAD.name} if spec.tied_embeddings else set()
    odd = sorted(name for name in set(files) - used - harmless if not name.endswith("rotary_emb.inv_freq"))
    if odd:
        raise ModelError(f"{folder}: the checkpoint has tensors config.json does not imply: {odd[:4]} ({len(odd)})")


def _slice(handles: Mapping[Path, Any], files: Mapping[str, Path], name: str, folder: Path) -> Any:
    if name not in files:
        raise ModelError(f"{folder}: the checkpoint has no tensor {name!r}, which config.json implies")
    return handles[files[name]].get_slice(name)


def _read(entry: Entry, slices: Mapping[str, Any], spec: ModelSpec, *, tp_rank: int, tp_size: int) -> Tensor:
    for name, view in slices.items():
        expected = expected_shape(name, spec)
        if tuple(view.get_shape()) != expected:
            raise ModelError(f"tensor {name!r} has shape {tuple(view.get_shape())}, config.json implies {expected}")
    if entry.split is Split.REPLICATED:
        return slices[entry.sources[0]][:]
    if entry.split is Split.COLUMNS:
        view = slices[entry.sources[0]]
        width = view.get_shape()[1] // tp_size
        return view[:, tp_rank * width : (tp_rank + 1) * width].contiguous()
    if entry.split is Split.ROWS:
        blocks = []
        for name in entry.sources:
            height = slices[name].get_shape()[0] // tp_size
            blocks.append(slices[name][tp_rank * height : (tp_rank + 1) * height])
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    view = slices[entry.sources[0]]
    height = spec.padded_vocab_size // tp_size
    start, stop = tp_rank * height, min((tp_rank + 1) * height, spec.vocab_size)
    rows = view[start:stop] if stop > start else view[0:0]
    return torch.cat([rows, rows.new_zeros(height - len(rows), rows.shape[1])]) if len(rows) < height else rows


def expected_shape(name: str, spec: ModelSpec) -> tuple[int, ...]:
    """Whole shape of an HF tensor, from its name."""
    leaf, kind = name.rsplit(".", 2)[-2:]
    if leaf in ("embed_tokens", "lm_head"):
        return (spec.vocab_size, spec.hidden_size)
    if leaf in ("q_norm", "k_norm"):
        return (spec.head_dim,)
    if leaf.endswith("norm"):
        return (spec.hidden_size,)
    out_features, in_features = spec.projection_shape(leaf)
    return (out_features,) if kind == "bias" else (out_features, in_features)


def check_checkpoint(folder: Path, spec: ModelSpec) -> None:
    """Opens every file and compares every tensor's shape with the config, reading headers only.

    Raises:
        ModelError: as :func:`load_shard`, before anything else has been started.
    """
    files = tensor_files(folder)
    with ExitStack() as stack:
        try:
            handles = {
                path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(files.values()))
            }
            for entry in entries(spec):
                for name in entry.sources:
                    shape, expected = (
                        tuple(_slice(handles, files, name, folder).get_shape()),
                        expected_shape(name, spec),
                    )
                    if shape != expected:
                        raise ModelError(f"tensor {name!r} has shape {shape}, config.json implies {expected}")
        except SafetensorError as error:
            raise ModelError(f"{folder}: the weights are damaged: {error}; fetch the model again") from error
