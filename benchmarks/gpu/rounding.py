"""Does the engine's norm and rotation round once or twice? Computed on a CPU, compared with what a GPU measured.

``agreement.py`` found how many elements of the first layer's norm and rotation came out of the trainer's kernels, which
rounded in between, as they came out of the engine's. If the engine rounds once, at the end, that fraction is the one
between the two ways of rounding, for the same tokens and weights; it needs no engine.

    python -m benchmarks.gpu.rounding --model folder --out out/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.gpu import report
from framework.data.chat import Chat

MEASURED = Path(__file__).parents[1] / "results" / "gpu" / "agreement.json"
NUM_TOKENS = 300
PROMPT = "Write a short story about the sea."


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def same(first: Tensor, second: Tensor) -> float:
    return float((first.bfloat16() == second.bfloat16()).float().mean())


def fractions(model: Path) -> dict[str, float]:
    """Elements that are the same, rounded in between or not."""
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(model / "model.safetensors").items()}
    config = json.loads((model / "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    prompt = Chat(AutoTokenizer.from_pretrained(model)).prompt([{"role": "user", "content": PROMPT}])
    tokens = torch.tensor((list(prompt.token_ids) * 20)[:NUM_TOKENS])
    x, w = weights["model.embed_tokens.weight"][tokens], weights["model.layers.0.input_layernorm.weight"]
    unit = x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
    normed = rounded(unit * w)
    found = {"norm": same(rounded(unit) * w, normed)}
    size = config["hidden_size"] // config["num_attention_heads"]
    angles = torch.arange(NUM_TOKENS)[:, None] / theta ** (torch.arange(0, size, 2) / size)
    cos, sin = rounded(angles.cos())[:, None], rounded(angles.sin())[:, None]
    for name in ("q", "k"):
        y = rounded(normed @ weights[f"model.layers.0.self_attn.{name}_proj.weight"].t()).unflatten(1, (-1, size))
        first, second = y.chunk(2, dim=-1)
        products = (first * cos, second * sin, second * cos, first * sin)
        a, b, c, d = (rounded(product) for product in products)
        once = torch.cat([products[0] - products[1], products[2] + products[3]], dim=-1)
        found[f"rotation of {name}"] = same(torch.cat([a - b, c + d], dim=-1), once)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measured = json.loads(MEASURED.read_text())["figures"]["part by part"]["layer 0"]
    rows = [
        {"function": name, "once against in between, CPU": value, "measured on the GPU": measured[name]["bit-equal"]}
        for name, value in fractions(args.model).items()
    ]
    print(report.table(rows))
    report.write(args.out / "rounding.json", rows)


if __name__ == "__main__":
    main()
