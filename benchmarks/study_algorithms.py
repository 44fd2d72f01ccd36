"""Question: how do the algorithms compare on the offline task at the same budget? One JSON per run, a figure, a table.

Every run is ``recipes/grpo.py`` as ``+recipe=grpo algorithm=A seed=S`` would start it, with a fresh adapter; one
process and one engine serve all of them. A run whose JSON exists is skipped, and after ``--minutes`` no further run is
begun, so the study can be made in pieces. The curves go to ``docs/study_algorithms.svg``, the table between the markers
of ``docs/algorithms.md``. Example: ``python -m benchmarks.study_algorithms --steps 20``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from framework.config import RunConfig, flatten, plain, schema, to_typed
from framework.runtime import POLICY, SamplingRuntime, open_records, open_sampling, versions
from recipes import grpo

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algorithms.md"
FIGURE = ROOT / "docs" / "study_algorithms.svg"
RESULTS = ROOT / "benchmarks" / "results" / "study_algorithms"
MARKERS = re.compile(r"(<!-- study -->\n).*?(<!-- /study -->)", re.DOTALL)
ALGORITHMS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo", "cispo", "ppo")
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 860, 420, 56, 24, 220, 48
WINDOW = 3
"""Steps that one point of a thick curve is the mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One algorithm with one seed; as JSON under ``benchmarks/results/study_algorithms``."""

    algorithm: str
    seed: int
    command: str
    """That made it, alone."""
    changed: dict[str, Any]
    """Configuration keys that are not at their default."""
    versions: dict[str, str]
    rewards: tuple[float, ...]
    """Mean over all rollouts that were drawn, of each step, before its update."""
    accuracy_start: float
    """Greedy, on held-out problems, before the first step."""
    accuracy_end: float
    num_rollouts: int
    """Drawn in the whole run; dynamic sampling draws more than the others."""
    clip_fraction: float
    """Mean over the steps of the share of tokens whose gradient the clip removed or, in CISPO, bounded."""
    step_s: float
    """Mean over the steps but the first."""


def configure(algorithm: str, seed: int, folder: Path, steps: int, overrides: Sequence[str]) -> RunConfig:
    """The configuration that the command line would give."""
    arguments = ["+recipe=grpo", f"algorithm={algorithm}", f"seed={seed}", f"num_steps={steps}", "evaluation.every=0"]
    arguments += [f"run_dir={folder}", "tracking.wandb=off", "tracking.tensorboard=false", *overrides]
    ConfigStore.instance().store(name="schema", node=schema())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_typed(compose("config", overrides=arguments))


def train(cfg: RunConfig, rt: SamplingRuntime) -> None:
    """One run with records and an adapter of its own; the adapter is gone afterwards."""
    grpo.run(cfg, replace(rt, **open_records(cfg, rt.base)))
    rt.weight_sync.release(POLICY)
    rt.trainer.remove_adapter(POLICY)


def read(cfg: RunConfig, folder: Path, command: str, found: dict[str, str]) -> Run:
    """What a finished run measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss/total" in row]
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    per_step = cfg.rollout.prompts_per_step * cfg.rollout.group_size
    clipped = [row.get("loss/clip_low_fraction", 0.0) + row.get("loss/clip_high_fraction", 0.0) for row in steps]
    defaults = flatten(plain(RunConfig()))
    ours = {key: value for key, value in flatten(plain(cfg)).items() if key != "run_dir" and value != defaults[key]}
    return Run(
        algorithm=cfg.algorithm.name,
        seed=cfg.seed,
        command=command,
        changed=ours,
        versions=found,
        rewards=tuple(row["reward/mean"] for row in steps),
        accuracy_start=accuracy[0],
        accuracy_end=accuracy[-1],
        num_rollouts=round(sum(per_step / row.get("rollout/filter_kept_fraction", 1.0) for row in steps)),
        clip_fraction=sum(clipped) / len(clipped),
        step_s=sum(row["time/step_s"] for row in steps[1:]) / max(1, len(steps) - 1),
    )


def by_algorithm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs in the order given, by algorithm."""
    return {name: [run for run in runs if run.algorithm == name] for name in dict.fromkeys(r.algorithm for r in runs)}


def table(runs: Sequence[Run]) -> str:
    """One line per algorithm."""
    seeds = sorted({run.seed for run in runs})
    header = ["algorithm", *(f"accuracy, seed {seed}" for seed in seeds), "mean", "reward, last 5 steps", "rollouts"]
    header += ["clipped tokens", "s per step"]
    lines = [header, ["---"] * len(header)]
    for name, group in by_algorithm(runs).items():
        ends = {run.seed: f"{run.accuracy_start:.3f} to {run.accuracy_end:.3f}" for run in group}
        cells = [f"`{name}`", *(ends.get(seed, "") for seed in seeds)]
        cells.append(f"{mean(run.accuracy_end for run in group):.3f}")
        cells.append(f"{mean(mean(run.rewards[-5:]) for run in group):.3f}")
        cells.append(f"{mean(run.num_rollouts for run in group):.0f}")
        cells.append(f"{100 * mean(run.clip_fraction for run in group):.1f}%")
        lines.append([*cells, f"{mean(run.step_s for run in group):.1f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mean(values: Any) -> float:
    """Of a non-empty iterable of numbers."""
    given = list(values)
    return float(sum(given)) / len(given)


def smoothed(group: Sequence[Run]) -> list[float]:
    """The mean over an algorithm's runs, of this step and the ``WINDOW - 1`` before it."""
    over_seeds = [mean(column) for column in zip(*(run.rewards for run in group), strict=True)]
    return [mean(over_seeds[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(over_seeds))]


def curves(runs: Sequence[Run]) -> str:
    """An SVG: the mean over seeds as a thick line, each seed as a thin one."""
    last = max(len(run.rewards) for run in runs)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(last - 1, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value)

    def line(values: Sequence[float], style: str) -> str:
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values, start=1))
        return f'<polyline fill="none" {style} points="{places}"/>'

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(6):
        value, step = tick / 5, round(1 + (last - 1) * tick / 5)
        grid = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line {grid} stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    title = f"mean training reward; thick: mean over seeds and the last {WINDOW} steps"
    parts.append(f'<text x="{LEFT}" y="{TOP - 8}">{title}</text>')
    for index, (name, group) in enumerate(by_algorithm(runs).items()):
        colour = COLOURS[index % len(COLOURS)]
        parts += [line(run.rewards, f'stroke="{colour}" stroke-opacity="0.2"') for run in group]
        parts.append(line(smoothed(group), f'stroke="{colour}" stroke-width="2.5"'))
        row = TOP + 16 + 22 * index
        left = WIDTH - RIGHT + 16
        parts.append(f'<line x1="{left}" x2="{left + 24}" y1="{row}" y2="{row}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 32}" y="{row + 4}">{name}</text>')
    body = "\n".join(parts)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def section(runs: Sequence[Run]) -> str:
    """What stands between the page's markers."""
    found = ", ".join(f"{name} {version}" for name, version in runs[0].versions.items())
    return f"![Reward by step](study_algorithms.svg)\n\n{table(runs)}\n\nMeasured with {found}.\n"


def write(runs: Sequence[Run], page: Path, figure: Path) -> None:
    """Replaces the figure and what stands between the page's markers."""
    text = page.read_text()
    if not MARKERS.search(text):
        sys.exit(f"{page} has no markers <!-- study --> and <!-- /study -->")
    figure.write_text(curves(runs))
    page.write_text(MARKERS.sub(lambda match: match[1] + section(runs) + match[2], text))


def main() -> None:
    """Trains what is missing, then draws everything that exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so many")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study_algorithms", help="the runs' own folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON per run")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page with the markers")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("overrides", nargs="*", help="further overrides for every run, after --")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    started, rt = time.monotonic(), None
    wanted = [(algorithm, seed) for seed in args.seeds for algorithm in args.algorithms]
    paths = {run: args.results / f"{run[0]}-{run[1]}.json" for run in wanted}
    for (algorithm, seed), path in paths.items():
        if path.is_file() or time.monotonic() - started > 60.0 * args.minutes:
            continue
        folder = args.runs.absolute() / f"{algorithm}-{seed}"
        cfg = configure(algorithm, seed, folder, args.steps, args.overrides)
        rt = rt or open_sampling(cfg)
        train(cfg, rt)
        command = f"python -m benchmarks.study_algorithms --steps {args.steps} --algorithms {algorithm} --seeds {seed}"
        run = read(cfg, folder, " ".join([command, *(["--", *args.overrides] if args.overrides else [])]), versions())
        path.write_text(json.dumps(asdict(run), indent=1) + "\n")
    runs = [Run(**json.loads(path.read_text())) for path in paths.values() if path.is_file()]
    runs.sort(key=lambda run: (args.algorithms.index(run.algorithm), run.seed))
    write(runs, args.page, args.figure)
    print(table(runs))


if __name__ == "__main__":
    main()
