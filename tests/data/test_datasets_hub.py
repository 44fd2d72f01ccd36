"""A hub data set: its converted files are downloaded once, and without a hub what was downloaded still serves."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow
import pyarrow.parquet

from framework.data.datasets import PARQUET_REVISION

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
SHOW = (
    "import sys\n"
    "from framework.data.datasets import open_rows\n"
    "from framework.errors import DataError\n"
    "try:\n"
    "    rows = open_rows(sys.argv[1], split=sys.argv[2], config='main')\n"
    "    print([rows[i]['q'] for i in range(len(rows))])\n"
    "except DataError as error:\n"
    "    print(f'DataError: {error}')\n"
)


class FakeHub(BaseHTTPRequestHandler):
    """One data set, ``a/b``, at its Parquet revision: its commit, its files, a file's content."""

    files: Mapping[str, bytes]

    def do_HEAD(self) -> None:
        headers, body = {"X-Repo-Commit": COMMIT}, b""
        match [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]:
            case ["api", "datasets", "a", "b", "tree", _]:
                rows = [{"type": "file", "path": path, "size": len(x), "oid": path} for path, x in self.files.items()]
                body = json.dumps(rows).encode()
            case ["api", "datasets", "a", "b", "revision", revision] if revision == PARQUET_REVISION:
                siblings = [{"rfilename": path} for path in self.files]
                body = json.dumps({"id": "a/b", "sha": COMMIT, "siblings": siblings}).encode()
            case ["datasets", "a", "b", "resolve", _, *path]:
                body = self.files["/".join(path)]
                headers["ETag"] = f'"{"-".join(path)}"'
            case _:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD  # noqa: N815 - the name http.server looks for

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve_hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a :class:`FakeHub` on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (FakeHub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def parquet(*values: int) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"q": value} for value in values]), out)
    return out.getvalue()


def show(name: str, split: str, home: Path, endpoint: str) -> str:
    """What :data:`SHOW` prints, in a process of its own: the hub client reads its settings at import."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, name, split],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_split_is_downloaded_and_serves_without_a_hub_later(tmp_path: Path) -> None:
    files = {
        "main/train/0000.parquet": parquet(1, 2),
        "main/train/0001.parquet": parquet(3),
        "main/test/0000.parquet": parquet(4),
        "socratic/train/0000.parquet": parquet(5),
    }
    with serve_hub(files) as endpoint:
        assert show("a/b", "train", tmp_path, endpoint) == "[1, 2, 3]"
    downloaded = [path.relative_to(tmp_path).parts[-3:] for path in tmp_path.rglob("snapshots/**/*.parquet")]
    assert sorted(downloaded) == [("main", "train", "0000.parquet"), ("main", "train", "0001.parquet")]
    assert show("a/b", "train", tmp_path, NOWHERE) == "[1, 2, 3]"
    assert "split 'test' was not downloaded before, and no hub answers" in show("a/b", "test", tmp_path, NOWHERE)


def test_what_the_hub_does_not_have_is_one_clear_error(tmp_path: Path) -> None:
    with serve_hub({"main/train/0000.parquet": parquet(1)}) as endpoint:
        assert show("c/d", "train", tmp_path, endpoint).startswith(
            "DataError: data c/d: it is no file or folder here, and the hub has no such data set"
        )
        assert "there is no split 'dev' of the configuration 'main'" in show("a/b", "dev", tmp_path, endpoint)


def test_no_hub_is_one_clear_error(tmp_path: Path) -> None:
    assert show("c/d", "train", tmp_path, NOWHERE).startswith(
        "DataError: data c/d: it is no file or folder here, split 'train' was not downloaded before, and no hub answers"
    )
