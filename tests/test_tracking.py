"""The tracker with its real backends: wandb offline, TensorBoard's own reader, the files in the run folder."""

from __future__ import annotations

import inspect
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from framework.errors import ConfigError, StorageError
from framework.tracking import SilentTracker, Tracker, TrackingConfig, start_wandb


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without credentials, so that the developer's own are never used."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_wandb(run_dir: Path) -> list[wandb_internal_pb2.Record]:
    """The records of an offline run: a LevelDB log (32 KiB blocks) after a header of 7 bytes."""
    wandb.teardown()  # its service writes in the background
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    records, position, parts = [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def test_a_run_reaches_every_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    tracker = Tracker.start(TrackingConfig(project="p", name="n"), run_dir, {"lora": {"rank": 8}}, num_steps=2)
    tracker.log(1, {"reward/mean": 0.25, "time/step_s": 2.0})
    tracker.log(2, {"reward/mean": 0.5, "parity/logprob_abs_diff_mean": math.nan})
    tracker.log_table(2, "samples", ["prompt", "reward"], [["1+1=", 1.0], ["2|2\n", 0.0]])
    path = tracker.finish({"eval/accuracy_end": 0.5, "versions": {"torch": "x"}})

    assert path == run_dir / "summary.json"
    assert json.loads(path.read_text()) == {"eval/accuracy_end": 0.5, "versions": {"torch": "x"}}
    lines = read_jsonl(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["reward/mean"] for line in lines] == [0.25, 0.5]
    assert math.isnan(lines[1]["parity/logprob_abs_diff_mean"])
    assert read_jsonl(run_dir / "samples.jsonl") == [
        {"step": 2, "prompt": "1+1=", "reward": 1.0},
        {"step": 2, "prompt": "2|2\n", "reward": 0.0},
    ]
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    out = capsys.readouterr().out
    assert "offline; to upload: wandb sync" in out
    assert f"summary: {path}" in out


def test_wandb_gets_the_steps_the_sections_the_table_and_the_summary(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = TrackingConfig(project="p", name="n", tensorboard=False)
    tracker = Tracker.start(config, run_dir, {"lora": {"rank": 8}}, num_steps=2, resume_id="abcd1234", resume_step=0)
    tracker.log(1, {"reward/mean": 0.25})
    tracker.log_table(1, "samples", ["prompt"], [["a"]])
    tracker.finish({"eval/accuracy_end": 0.5})
    records = read_wandb(run_dir)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == ("abcd1234", "p", "n")
    assert tracker.run_id == "abcd1234"
    assert {c.key: json.loads(c.value_json) for c in run.config.update if c.key == "lora"} == {"lora": {"rank": 8}}
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.metric.glob_name}
    assert axes["reward/*"] == axes["time/*"] == axes["memory/*"] == "step"
    history = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert history[0]["step"] == 1
    assert history[0]["reward/mean"] == 0.25
    assert history[1]["samples/samples/_type"] == "table-file"
    summary = {i.key: i.value_json for r in records for i in r.summary.update}
    assert summary["eval/accuracy_end"] == "0.5"
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]


def test_wandb_marks_an_aborted_run_failed_and_no_summary_is_written(tmp_path: Path) -> None:
    tracker = Tracker.start(TrackingConfig(tensorboard=False), tmp_path / "run", {}, num_steps=2)
    tracker.abort()
    records = read_wandb(tmp_path / "run")
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_online_without_a_login_warns_and_is_offline(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="WANDB_API_KEY"):
        sink, said = start_wandb(TrackingConfig(wandb="online"), tmp_path, {}, "abcd1234")
    assert said.startswith("offline")
    assert sink is not None
    sink.close({}, 0)


def test_a_malformed_key_warns_and_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "no key")
    with pytest.warns(RuntimeWarning, match="wandb could not start online"):
        sink, said = start_wandb(TrackingConfig(), tmp_path, {}, "abcd1234")
    assert said.startswith("offline")
    assert sink is not None
    sink.close({}, 0)


def test_auto_follows_the_variable_and_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start_wandb(TrackingConfig(), tmp_path, {}, "a") == (None, "off")
    assert start_wandb(TrackingConfig(wandb="off"), tmp_path, {}, "a") == (None, "off")


@pytest.mark.filterwarnings("error")
def test_wandb_that_dies_in_a_run_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    config = TrackingConfig(tensorboard=False)
    tracker = Tracker.start(config, tmp_path / "run", {}, num_steps=2)
    assert wandb.run is not None
    wandb.run.finish()  # from now on wandb refuses to log
    with pytest.warns(RuntimeWarning, match="wandb stopped working"):
        tracker.log(1, {"reward/mean": 0.25})
    tracker.log(2, {"reward/mean": 0.5})  # warnings are errors here: a second one would raise
    tracker.finish({})
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="off")
    first = Tracker.start(config, tmp_path, {}, num_steps=9)
    for step in range(1, 6):
        first.log(step, {"reward/mean": float(step)})
        first.log_table(step, "samples", ["prompt"], [["killed"]])
    first.abort()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')  # the kill came in the middle of a line
    second = Tracker.start(config, tmp_path, {}, num_steps=9, resume_id=first.run_id, resume_step=3)
    for step in range(4, 7):
        second.log(step, {"reward/mean": -float(step)})
        second.log_table(step, "samples", ["prompt"], [["resumed"]])
    second.finish({})
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["reward/mean"]) for line in lines] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, -4),
        (5, -5),
        (6, -6),
    ]
    samples = [line["prompt"] for line in read_jsonl(tmp_path / "samples.jsonl")]
    assert samples == ["killed"] * 3 + ["resumed"] * 3
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, -4),
        (5, -5),
        (6, -6),
    ]
    assert second.run_id == first.run_id


def test_a_new_run_in_an_old_folder_sets_the_old_file_aside(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="off", tensorboard=False)
    for value in (1.0, 2.0):
        tracker = Tracker.start(config, tmp_path, {}, num_steps=1)
        tracker.log(1, {"reward/mean": value})
        tracker.finish({})
    assert [line["reward/mean"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [2.0]
    assert [line["reward/mean"] for line in read_jsonl(tmp_path / "metrics.jsonl.old")] == [1.0]


def test_bad_names_and_options_are_refused(tmp_path: Path) -> None:
    tracker = Tracker.start(TrackingConfig(wandb="off", tensorboard=False), tmp_path, {}, num_steps=1)
    with pytest.raises(ConfigError, match="'Reward'"):
        tracker.log(1, {"Reward": 1.0})
    with pytest.raises(ConfigError, match="table 'metrics'"):
        tracker.log_table(1, "metrics", [], [])
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    with pytest.raises(ConfigError, match=r"tracking.wandb='maybe'.*auto"):
        TrackingConfig(wandb="maybe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tracking\.console_every=0"):
        TrackingConfig(console_every=0)


def test_a_run_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="run_dir"):
        Tracker.start(TrackingConfig(wandb="off"), tmp_path / "file" / "run", {}, num_steps=1)


def test_the_silent_tracker_has_the_same_methods_and_writes_nothing(tmp_path: Path) -> None:
    def public(cls: type) -> dict[str, Any]:
        return {
            name: inspect.signature(member) if callable(member) else property
            for name, member in vars(cls).items()
            if not name.startswith("_") and name != "start"
        }

    assert public(SilentTracker) == public(Tracker)
    silent = SilentTracker(tmp_path, "abcd1234")
    silent.log(1, {"reward/mean": 1.0})
    silent.log_table(1, "samples", ["a"], [["b"]])
    assert silent.finish({}) == tmp_path / "summary.json"
    assert silent.run_id == "abcd1234"
    assert list(tmp_path.glob("*.json*")) == []
