"""Draws a run's learning curve as an SVG: ``python docs/plot_curve.py runs/grpo/<time> docs/images/grpo.svg``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 56, 40, 20, 48


def points(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every line of ``metrics.jsonl`` that has ``metric``."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[metric]) for row in rows if metric in row]


def polyline(values: Sequence[tuple[int, float]], last_step: int, colour: str, *, dots: bool) -> str:
    """One curve; values lie in [0, 1]."""
    span_x, span_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    places = [(LEFT + span_x * step / last_step, TOP + span_y * (1 - value)) for step, value in values]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places) if dots else ""
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2"/>{marks}'


def draw(run_dir: Path) -> str:
    """The whole picture: mean reward of each step, greedy accuracy on held-out problems."""
    reward, accuracy = points(run_dir, "reward/mean"), points(run_dir, "eval/accuracy")
    last = max(step for step, _ in reward + accuracy)
    span_x, span_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(6):
        y = TOP + span_y * (1 - tick / 5)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:.1f}</text>')
        x = LEFT + span_x * tick / 5
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{last * tick / 5:.0f}</text>')
    parts.append(polyline(reward, last, "#9bb7d4", dots=False))
    parts.append(polyline(accuracy, last, "#c0392b", dots=True))
    parts.append(f'<text x="{LEFT}" y="22" fill="#c0392b">greedy accuracy on held-out problems</text>')
    parts.append(f'<text x="{LEFT + 270}" y="22" fill="#5b7fa6">mean reward of the step</text>')
    parts.append(f'<text x="{LEFT + span_x / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(Path(sys.argv[1])))
