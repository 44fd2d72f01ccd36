"""A trained model as a Hugging Face folder: the base model's folder with other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from framework import storage
from framework.errors import StorageError

MAX_FILE_BYTES = 5 * 2**30
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")


def save_model(
    folder: Path, *, base: Path, tensors: Mapping[str, Tensor], max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes a model folder atomically: ``folder`` is the old model or the whole new one, never a part.

    Args:
        folder: what is written; loads with ``AutoModelForCausalLM.from_pretrained``, in vLLM and here.
        base: the base model's folder; its configuration, tokenizer and chat template are copied.
        tensors: whole weights by HF name, on the CPU.
        max_file_bytes: of one safetensors file; more go into several with an index.

    Raises:
        StorageError: the folder cannot be written, or is something else than a model.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise StorageError(f"{folder} exists and is no model folder; it is not replaced")
    temporary = storage.temporary_name(folder)
    try:
        with storage.writing(folder, change="run_dir"):
            temporary.mkdir(parents=True)
            for file in sorted(base.iterdir()):
                if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
                    shutil.copyfile(file, temporary / file.name)
            _write_weights(temporary, tensors, max_file_bytes)
            storage.publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], max_file_bytes: int) -> None:
    parts = list(_parts(tensors, max_file_bytes))
    if len(parts) == 1:
        storage.write_tensors(folder / "model.safetensors", parts[0], metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        storage.write_tensors(folder / name, part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    storage.write_bytes(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


def _parts(tensors: Mapping[str, Tensor], max_file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, cut where a file would grow beyond the limit."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > max_file_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part
