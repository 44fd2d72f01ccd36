"""Are the first ten losses of ``+recipe=sft`` those of transformers with PEFT, on the default model?

The same rows, initial factors and hyper-parameters in fp32, with both training backends; the reference is written with
transformers, PEFT and torch alone (``tests/recipes/sft_scenario.py``). Writes
``benchmarks/results/sft_against_peft.json`` and ends with status 1 if a loss differs by more than 1e-4 of itself.

    python -m benchmarks.sft_against_peft
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from framework.models.hub import DEFAULT_MODEL, default_cache_dir, resolve_model
from framework.runtime import versions
from tests.ranks import run_ranks
from tests.recipes.sft_scenario import peft_losses, sft_config

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "examples" / "data" / "largest.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "sft_against_peft.json"
TOLERANCE = 1e-4


def main() -> None:
    model = resolve_model(DEFAULT_MODEL, cache_dir=default_cache_dir()).path
    target = "tests.recipes.sft_scenario:on_one_rank"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {"model": model, "rows": ROWS, "run_dir": folder}
        (losses,) = run_ranks(target, folder / "out", nproc=1, timeout_s=480.0, **given)
        losses["peft"] = peft_losses(sft_config(model, ROWS, folder))
    differences = {
        backend: max(abs(ours / theirs - 1.0) for ours, theirs in zip(losses[backend], losses["peft"], strict=True))
        for backend in ("megatron", "hf")
    }
    result = {
        "command": "python -m benchmarks.sft_against_peft",
        "model": DEFAULT_MODEL,
        "versions": versions(),
        "losses": losses,
        "largest_relative_difference": differences,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(differences))
    sys.exit(max(differences.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
