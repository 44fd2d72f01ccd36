"""Where a run's numbers go: console, ``metrics.jsonl``, TensorBoard and wandb. The only user of wandb.

Rank 0 of the run holds a :class:`Tracker`, every other rank a :class:`SilentTracker`. Only recipes call ``log``, with
means that metrics.py made. A tracking service that is down never stops a run: it is named in a warning, and
``metrics.jsonl`` has everything.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

from framework import storage
from framework.console import ConsoleSink
from framework.errors import ConfigError
from framework.metrics import SECTIONS, check_metrics

WandbMode = Literal["auto", "online", "offline", "off"]

_AUTO: dict[str, WandbMode] = {"online": "online", "offline": "offline", "disabled": "off"}
_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """What is tracked besides ``metrics.jsonl``, which always is."""

    project: str = "tandem"
    """wandb's project."""
    name: str | None = None
    """The run's name; None takes the name of the run folder."""
    wandb: WandbMode = "auto"
    """``auto`` follows WANDB_MODE, else is online when a login is found and offline when not; ``online`` without a
    login warns and is offline; ``off`` does not import wandb."""
    tensorboard: bool = True
    console_every: int = 1
    """Prints every so many steps."""

    def __post_init__(self) -> None:
        if self.wandb not in get_args(WandbMode):
            raise ConfigError(f"tracking.wandb={self.wandb!r}: must be one of {list(get_args(WandbMode))}")
        if self.console_every < 1:
            raise ConfigError(f"tracking.console_every={self.console_every}: must be at least 1")


class Sink(Protocol):
    """One place that receives what is logged. Names and values have been checked."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None: ...


class JsonlSink:
    """``metrics.jsonl``, one object per ``log`` call, and ``<table>.jsonl``, one object per row.

    NaN and infinities are written as ``NaN`` and ``Infinity``, which Python and pandas read back.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._run_dir = run_dir
        self._resume_step = resume_step
        self._opened: set[str] = set()
        self._append("metrics", [])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append("metrics", [{"step": step, "timestamp": round(time.time(), 3), **metrics}])

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._append(name, [{"step": step, **dict(zip(columns, row, strict=True))} for row in rows])

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Nothing is held open."""

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        path = self._run_dir / f"{name}.jsonl"
        with storage.writing(path, change="run_dir"):
            if name not in self._opened:
                self._begin(path)
                self._opened.add(name)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _begin(self, path: Path) -> None:
        """Sets an earlier run's file aside, or cuts a resumed run's file after the step it resumes from."""
        if not path.exists():
            return
        if self._resume_step is None:
            path.replace(path.with_suffix(".jsonl.old"))
            return
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the killed run's last write
        kept = [line for line in lines if json.loads(line)["step"] <= self._resume_step]
        storage.replace_file(path, b"".join(kept))


class TensorBoardSink:
    """Event files under ``tensorboard/``."""

    def __init__(self, run_dir: Path, run_config: Mapping[str, Any], resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by every run

        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        text = json.dumps(run_config, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [" | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in line) for line in lines]
        self._writer.add_text(name, "\n".join(cells), step)

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._writer.close()


class WandbSink:
    """A wandb run. What wandb raises after its start is said once, as a warning, and ends this sink only."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._dead = False
        run.define_metric("step", hidden=True)
        for section in SECTIONS:
            run.define_metric(f"{section}/*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._guard(lambda: self._run.log({"step": step, **metrics}))

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._guard(lambda: self._run.log({"step": step, f"samples/{name}": table}))

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._guard(lambda: self._run.summary.update(dict(summary)))
        self._guard(lambda: self._run.finish(exit_code=exit_code))

    def _guard(self, call: Callable[[], object]) -> None:
        import wandb

        if self._dead:
            return
        try:
            call()
        except (wandb.Error, OSError) as error:
            self._dead = True
            _warn(f"wandb stopped working and gets nothing more of this run: {error}")


def start_wandb(
    config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], run_id: str
) -> tuple[WandbSink | None, str]:
    """Starts wandb without ever asking a question.

    Returns:
        The sink and what to say about it. No sink when wandb is off or, after a warning, does not even start offline.
    """
    mode = config.wandb
    if mode == "auto":
        mode = _AUTO.get(os.environ.get("WANDB_MODE", "")) or ("online" if _has_wandb_login() else "offline")
    if mode == "off":
        return None, "off"
    attempts: tuple[Literal["online", "offline"], ...] = ("online", "offline") if mode == "online" else ("offline",)
    if mode == "online" and not _has_wandb_login():
        _warn("tracking.wandb=online, but neither WANDB_API_KEY nor `wandb login` is there; going on offline")
        attempts = ("offline",)
    import wandb

    quiet = {"silent": True, "quiet": True, "console": "off", "disable_git": True, "disable_code": True}
    for attempt in attempts:
        try:
            run = wandb.init(
                project=config.project,
                name=config.name or run_dir.name,
                id=run_id,
                dir=str(run_dir),
                mode=attempt,
                resume="allow" if attempt == "online" else None,
                config=dict(run_config),
                settings=wandb.Settings(init_timeout=30, **quiet),
            )
        except Exception as error:  # noqa: BLE001 - wandb raises types it does not export; no run may die of it
            _warn(f"wandb could not start {attempt}: {error}")
            wandb.teardown()  # its service still holds the run id (wandb 0.31) and would refuse the next attempt
            continue
        folder = Path(run.dir).parent
        return WandbSink(run), str(run.url) if attempt == "online" else f"offline; to upload: wandb sync {folder}"
    return None, "failed, see the warning above; metrics.jsonl has everything"


class Tracker:
    """Rank 0's tracker: checks names, then hands every call to each sink."""

    def __init__(self, sinks: Sequence[Sink], run_dir: Path, run_id: str) -> None:
        self._sinks = tuple(sinks)
        self._run_dir = run_dir
        self._run_id = run_id

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        *,
        num_steps: int,
        resume_id: str | None = None,
        resume_step: int | None = None,
    ) -> Tracker:
        """Opens every backend and prints where things go.

        Args:
            run_dir: the run's folder; made if missing.
            run_config: the resolved configuration, for the dashboards.
            num_steps: the run's last step, for progress.
            resume_id: :attr:`run_id` of the run that is continued.
            resume_step: the step of the checkpoint that is continued from; what was logged after it is dropped.
        """
        with storage.writing(run_dir, change="run_dir"):
            run_dir.mkdir(parents=True, exist_ok=True)
        run_id = resume_id or secrets.token_hex(4)
        sinks: list[Sink] = [JsonlSink(run_dir, resume_step)]
        if config.tensorboard:
            sinks.append(TensorBoardSink(run_dir, run_config, resume_step))
        wandb_sink, wandb_state = start_wandb(config, run_dir, run_config, run_id)
        if wandb_sink is not None:
            sinks.append(wandb_sink)
        sinks.append(ConsoleSink(every=config.console_every, num_steps=num_steps, first_step=resume_step or 0))
        print(f"run {config.name or run_dir.name} ({run_id}) in {run_dir}", flush=True)
        print(
            f"  {num_steps} steps; wandb: {wandb_state}; tensorboard: {'on' if config.tensorboard else 'off'}",
            flush=True,
        )
        return cls(sinks, run_dir, run_id)

    @property
    def run_id(self) -> str:
        """Goes into checkpoints, so that a resumed run continues the same wandb run."""
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps count from 1; step 0 is before training. Several calls for one step add up.

        Raises:
            ConfigError: see :func:`check_metrics`.
            StorageError: ``metrics.jsonl`` could not be written.
        """
        checked = check_metrics(metrics)
        for sink in self._sinks:
            sink.log(step, checked)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of samples, to ``<name>.jsonl`` and the dashboards."""
        if not _TABLE_NAME.fullmatch(name) or name == "metrics":
            raise ConfigError(f"table {name!r}: a name must match {_TABLE_NAME.pattern} and not be 'metrics'")
        for sink in self._sinks:
            sink.log_table(step, name, columns, rows)

    def finish(self, summary: Mapping[str, Any]) -> Path:
        """Ends a run that went well: writes ``summary.json`` atomically, closes the backends, prints where it is.

        Raises:
            StorageError: ``summary.json`` could not be written.
        """
        path = self._run_dir / "summary.json"
        with storage.writing(path, change="run_dir"):
            storage.replace_file(path, json.dumps(dict(summary), indent=2, sort_keys=True).encode() + b"\n")
        self._close(summary, exit_code=0)
        print(f"summary: {path}", flush=True)
        return path

    def abort(self) -> None:
        """Ends a run that failed: closes the backends, wandb marks it failed; no ``summary.json``."""
        self._close({}, exit_code=1)

    def _close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for sink in self._sinks:
            sink.close(summary, exit_code)
        self._sinks = ()


class SilentTracker:
    """Every other rank's tracker: the same methods, no effect."""

    def __init__(self, run_dir: Path, run_id: str = "") -> None:
        self._run_dir = run_dir
        self._run_id = run_id

    @property
    def run_id(self) -> str:
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        check_metrics(metrics)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> Path:
        return self._run_dir / "summary.json"

    def abort(self) -> None: ...


def _has_wandb_login() -> bool:
    """Whether wandb would find credentials: the environment, or ``wandb login``'s entry in the netrc file."""
    import wandb

    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    home = Path.home()
    paths = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    host = urlsplit(wandb.Settings().base_url).hostname or ""
    for path in paths:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue  # wandb cannot read it either
    return False


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
