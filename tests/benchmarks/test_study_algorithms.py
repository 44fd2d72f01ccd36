"""The study's table and curves, from runs with known numbers."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.study_algorithms import MARKERS, Run, curves, read, section, table

SVG = "{http://www.w3.org/2000/svg}"
RUNS = [
    Run(algorithm="grpo", seed=0, accuracy={0: 0.25, 10: 0.5}, step_s=2.0),
    Run(algorithm="rloo", seed=0, accuracy={0: 0.25, 10: 0.75}, step_s=3.0),
    Run(algorithm="grpo", seed=1, accuracy={0: 0.25, 10: 1.0}, step_s=4.0),
    Run(algorithm="rloo", seed=1, accuracy={0: 0.25, 10: 0.25}, step_s=3.0),
]


def test_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "loss/total": 1.0, "time/step_s": 2.0},
        {"step": 2, "loss/total": 1.0, "time/step_s": 4.0},
        {"step": 2, "eval/accuracy": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read("grpo", 3, tmp_path) == Run(algorithm="grpo", seed=3, accuracy={0: 0.25, 2: 0.5}, step_s=3.0)


def test_the_table_has_ends_means_and_seconds() -> None:
    assert table(RUNS).splitlines() == [
        "| algorithm | seed 0 | seed 1 | mean at the end | mean over the run | s per step |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `grpo` | 0.500 | 1.000 | 0.750 | 0.500 | 3.0 |",
        "| `rloo` | 0.750 | 0.250 | 0.500 | 0.375 | 3.0 |",
    ]


def test_the_curves_are_one_thin_line_per_run_and_one_thick_per_algorithm() -> None:
    lines = ET.fromstring(curves(RUNS)).findall(f"{SVG}polyline")
    assert len(lines) == 6
    heights = [[float(point.partition(",")[2]) for point in line.get("points", "").split()] for line in lines]
    thick = [values for line, values in zip(lines, heights, strict=True) if line.get("stroke-width")]
    grpo, rloo = thick
    assert grpo[0] == rloo[0]
    assert grpo[1] < rloo[1] < rloo[0]  # y grows downwards
    assert abs(grpo[1] - (heights[0][1] + heights[1][1]) / 2) < 0.11  # the mean of the two seeds


def test_the_section_replaces_what_stood_between_the_markers() -> None:
    page = "before\n<!-- study -->\nold\n<!-- /study -->\nafter\n"
    text = section(RUNS, "python x")
    new = MARKERS.sub(lambda match: match[1] + text + match[2], page)
    assert "old" not in new
    assert new.startswith("before\n<!-- study -->\n![")
    assert new.endswith("Made by `python x`.\n<!-- /study -->\nafter\n")
    assert MARKERS.sub(lambda match: match[1] + text + match[2], new) == new
