"""The study's table and curves, from runs with known numbers; its configuration is the command line's."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_algorithms import (
    ALGORITHMS,
    MARKERS,
    RESULTS,
    Run,
    configure,
    curves,
    read,
    section,
    table,
    write,
)
from framework.algorithms.catalog import ALGORITHMS as KNOWN

SVG = "{http://www.w3.org/2000/svg}"


def a_run(algorithm: str, seed: int, rewards: tuple[float, ...], end: float, **changed: Any) -> Run:
    values: dict[str, Any] = {
        "command": "python x",
        "changed": {},
        "versions": {"torch": "2.0"},
        "accuracy_start": 0.25,
    }
    values |= {"num_rollouts": 128, "clip_fraction": 0.125, "step_s": 2.0, **changed}
    return Run(algorithm=algorithm, seed=seed, rewards=rewards, accuracy_end=end, **values)


RUNS = [
    a_run("grpo", 0, (0.2, 0.4), 0.5),
    a_run("grpo", 1, (0.4, 0.8), 1.0, step_s=4.0),
    a_run("rloo", 0, (0.2, 0.2), 0.75, num_rollouts=256, clip_fraction=0.0),
]


def test_the_configuration_is_what_the_command_line_gives(tmp_path: Path) -> None:
    cfg = configure("gspo", 3, tmp_path, 20, ["sampling.max_tokens=6"])
    assert cfg.algorithm == KNOWN["gspo"]
    assert (cfg.recipe, cfg.seed, cfg.num_steps, cfg.sampling.max_tokens) == ("grpo", 3, 20, 6)
    assert (cfg.evaluation.every, cfg.optimizer.learning_rate) == (0, 1e-4)
    assert set(ALGORITHMS) <= set(KNOWN)


def test_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "loss/total": 1.0, "time/step_s": 9.0, "reward/mean": 0.1, "loss/clip_low_fraction": 0.25},
        {"step": 2, "loss/total": 1.0, "time/step_s": 4.0, "reward/mean": 0.3, "rollout/filter_kept_fraction": 0.5},
        {"step": 2, "eval/accuracy": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = configure("rloo", 1, tmp_path, 2, ["lora.rank=4"])
    run = read(cfg, tmp_path, "python y", {"torch": "2.0"})
    assert run.changed["lora.rank"] == 4
    assert run.changed["algorithm.advantage"] == "leave_one_out"
    assert "run_dir" not in run.changed
    expected = a_run("rloo", 1, (0.1, 0.3), 0.5, command="python y", changed=run.changed, step_s=4.0)
    assert run == Run(**{**asdict(expected), "num_rollouts": 64 + 128, "clip_fraction": 0.125})


def test_the_table_has_ends_means_rollouts_and_seconds() -> None:
    assert table(RUNS).splitlines() == [
        "| algorithm | accuracy, seed 0 | accuracy, seed 1 | mean | reward, last 5 steps | rollouts | clipped tokens | "
        "s per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `grpo` | 0.250 to 0.500 | 0.250 to 1.000 | 0.750 | 0.450 | 128 | 12.5% | 3.0 |",
        "| `rloo` | 0.250 to 0.750 |  | 0.750 | 0.200 | 256 | 0.0% | 2.0 |",
    ]


def test_the_curves_are_one_thin_line_per_run_and_one_thick_per_algorithm() -> None:
    lines = ET.fromstring(curves(RUNS)).findall(f"{SVG}polyline")
    assert len(lines) == 5
    heights = [[float(point.partition(",")[2]) for point in line.get("points", "").split()] for line in lines]
    grpo, rloo = (values for line, values in zip(lines, heights, strict=True) if line.get("stroke-width"))
    # 348 pixels for rewards from 0 to 1, growing downwards. Means over the seeds 0.3 and 0.6, and of both steps 0.45.
    assert grpo == pytest.approx([24 + 348 * 0.7, 24 + 348 * 0.55], abs=0.06)
    assert rloo == pytest.approx([24 + 348 * 0.8] * 2, abs=0.06)


def test_the_section_replaces_what_stood_between_the_markers(tmp_path: Path) -> None:
    page, figure = tmp_path / "page.md", tmp_path / "figure.svg"
    page.write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    for _ in range(2):
        write(RUNS, page, figure)
        assert page.read_text() == f"before\n<!-- study -->\n{section(RUNS)}<!-- /study -->\nafter\n"
    assert "Measured with torch 2.0." in page.read_text()
    assert figure.read_text() == curves(RUNS)


def test_the_page_shows_the_runs_that_are_recorded() -> None:
    runs = [Run(**json.loads(path.read_text())) for path in RESULTS.glob("*.json")]
    assert runs
    runs.sort(key=lambda run: (ALGORITHMS.index(run.algorithm), run.seed))
    page = (RESULTS.parents[2] / "docs" / "algorithms.md").read_text()
    found = MARKERS.search(page)
    assert found
    assert table(runs) in found[0]
