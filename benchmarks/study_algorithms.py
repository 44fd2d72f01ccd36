"""Question: how do the algorithms compare on the offline task at an equal number of steps? Curves and a table.

Runs ``+recipe=grpo algorithm=A seed=S`` for every algorithm and seed, one after the other, and skips runs that are
finished. Writes the curves as ``docs/study_algorithms.svg`` and, between the markers of ``docs/algorithms.md``, the
table. Example: ``python benchmarks/study_algorithms.py --steps 30 -- model.name_or_path=path/to/model``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algorithms.md"
FIGURE = ROOT / "docs" / "study_algorithms.svg"
MARKERS = re.compile(r"(<!-- study -->\n).*?(<!-- /study -->)", re.DOTALL)
ALGORITHMS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo", "cispo", "ppo")
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 420, 56, 24, 220, 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One algorithm with one seed."""

    algorithm: str
    seed: int
    accuracy: Mapping[int, float]
    """Held-out greedy accuracy by step."""
    step_s: float
    """Mean over the steps."""


def train(algorithm: str, seed: int, folder: Path, steps: int, every: int, overrides: Sequence[str]) -> None:
    """One run in its own process group; a finished one is left as it is."""
    if (folder / "summary.json").is_file():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(ROOT / "launch" / "train.py"), "+recipe=grpo", f"algorithm={algorithm}", f"seed={seed}"]
    command += [f"num_steps={steps}", f"evaluation.every={every}", f"run_dir={folder}", "resume=auto"]
    command += ["tracking.wandb=off", "tracking.tensorboard=false", *overrides]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def read(algorithm: str, seed: int, folder: Path) -> Run:
    """What a finished run measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss/total" in row]
    return Run(
        algorithm=algorithm,
        seed=seed,
        accuracy={row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row},
        step_s=sum(row["time/step_s"] for row in steps) / len(steps),
    )


def by_algorithm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs in the order given, by algorithm."""
    return {name: [run for run in runs if run.algorithm == name] for name in dict.fromkeys(r.algorithm for r in runs)}


def table(runs: Sequence[Run]) -> str:
    """One line per algorithm."""
    seeds = sorted({run.seed for run in runs})
    header = ["algorithm", *(f"seed {seed}" for seed in seeds), "mean at the end", "mean over the run", "s per step"]
    lines = [header, ["---"] * len(header)]
    for name, group in by_algorithm(runs).items():
        ends = [run.accuracy[max(run.accuracy)] for run in group]
        overall = [value for run in group for value in run.accuracy.values()]
        numbers = [*ends, sum(ends) / len(ends), sum(overall) / len(overall)]
        seconds = sum(run.step_s for run in group) / len(group)
        lines.append([f"`{name}`", *(f"{number:.3f}" for number in numbers), f"{seconds:.1f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def curves(runs: Sequence[Run]) -> str:
    """An SVG: the mean over seeds as a line, each seed as a thin one."""
    last = max(max(run.accuracy) for run in runs)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value)

    def line(points: Mapping[int, float], style: str) -> str:
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in sorted(points.items()))
        return f'<polyline fill="none" {style} points="{places}"/>'

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(6):
        value, step = tick / 5, round(last * tick / 5)
        grid = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line {grid} stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 8}">held-out greedy accuracy; thick: mean over seeds</text>')
    for index, (name, group) in enumerate(by_algorithm(runs).items()):
        colour = COLOURS[index % len(COLOURS)]
        shared = set.intersection(*(set(run.accuracy) for run in group))
        mean = {step: sum(run.accuracy[step] for run in group) / len(group) for step in shared}
        parts += [line(run.accuracy, f'stroke="{colour}" stroke-opacity="0.3"') for run in group]
        parts.append(line(mean, f'stroke="{colour}" stroke-width="2.5"'))
        row = TOP + 16 + 22 * index
        left = WIDTH - RIGHT + 16
        parts.append(f'<line x1="{left}" x2="{left + 24}" y1="{row}" y2="{row}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 32}" y="{row + 4}">{name}</text>')
    body = "\n".join(parts)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def section(runs: Sequence[Run], command: str) -> str:
    """What stands between the page's markers."""
    return f"![Accuracy by step](study_algorithms.svg)\n\n{table(runs)}\n\nMade by `{command}`.\n"


def main() -> None:
    """Trains what is missing, then draws everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study_algorithms")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page with the markers")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("overrides", nargs="*", help="further overrides for every run, after --")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        for algorithm in args.algorithms:
            folder = args.runs.absolute() / f"{algorithm}-{seed}"
            train(algorithm, seed, folder, args.steps, args.every, args.overrides)
            runs.append(read(algorithm, seed, folder))
    options = [f"--{name} {getattr(args, name)}" for name in ("steps", "every")]
    options += [f"--{name} {' '.join(map(str, getattr(args, name)))}" for name in ("algorithms", "seeds")]
    options += ["--", *args.overrides] if args.overrides else []
    text = section(runs, f"python benchmarks/study_algorithms.py {' '.join(options)}")
    page = args.page.read_text()
    if not MARKERS.search(page):
        sys.exit(f"{args.page} has no markers <!-- study --> and <!-- /study -->")
    args.figure.write_text(curves(runs))
    args.page.write_text(MARKERS.sub(lambda match: match[1] + text + match[2], page))
    print(table(runs))


if __name__ == "__main__":
    main()
