"""What test_sft.py compares: SFT by both backends in one process, and the same run written with transformers and PEFT.

The reference shares with the framework the order of the rows and the initial A, which is what equal seeds mean, and
nothing else: tokens, masks, padding, loss, gradients, clipping and AdamW are transformers', PEFT's and torch's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.config import RunConfig
from framework.data.order import ShuffledOrder
from framework.lora.init import init_a
from framework.pair import open_trainer
from framework.runtime import open_records, open_training
from recipes import sft
from tests.recipes.scenario import config

HELDOUT = 4
OPTIONS: dict[str, Any] = {
    "recipe": "sft",
    "num_steps": 10,
    "seed": 5,
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 0.5},
    "trainer__max_tokens_per_microbatch": 256,
}


def sft_config(model: Path, rows: Path, run_dir: Path, batch_size: int = 8) -> RunConfig:
    """Ten steps in fp32; the microbatch budget makes several microbatches of a batch."""
    data = {"name_or_path": str(rows), "batch_size": batch_size, "heldout_rows": HELDOUT}
    return config(model, run_dir, **OPTIONS, data=data)


def on_one_rank(model: Path, rows: Path, run_dir: Path) -> dict[str, list[float]]:
    """The losses of each step by backend."""
    cfg = sft_config(model, rows, run_dir / "megatron")
    rt = open_training(cfg)
    sft.run(cfg, rt)
    other = replace(cfg, run_dir=str(run_dir / "hf"), trainer=replace(cfg.trainer, backend="hf"))
    sft.run(other, replace(rt, trainer=open_trainer(other, rt.base, {}), **open_records(other, rt.base)))
    return {backend: losses_of(run_dir / backend) for backend in ("megatron", "hf")}


def losses_of(run_dir: Path) -> list[float]:
    """Every step's loss, in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/total"] for row in rows if "loss/total" in row]


def peft_losses(cfg: RunConfig) -> list[float]:
    """The losses of each step, by transformers and PEFT."""
    rows = [json.loads(line) for line in Path(cfg.data.name_or_path).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.name_or_path)
    base = AutoModelForCausalLM.from_pretrained(cfg.model.name_or_path, dtype=torch.float32)
    lora = LoraConfig(r=cfg.lora.rank, lora_alpha=int(cfg.lora.alpha), target_modules=list(cfg.lora.targets))
    model = get_peft_model(base, lora)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in parameters.items():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            a = init_a(path, rank=cfg.lora.rank, in_features=value.shape[1], seed=cfg.seed)
            value.data.copy_(a)
    return _train(cfg, model, list(parameters.values()), tokenizer, rows, cfg.num_steps)


def _train(
    cfg: RunConfig,
    model: Any,
    parameters: list[torch.nn.Parameter],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    num_steps: int,
) -> list[float]:
    """AdamW on the rows in the framework's order."""
    opt = cfg.optimizer
    adamw = torch.optim.AdamW(parameters, lr=opt.learning_rate, eps=opt.eps, weight_decay=opt.weight_decay)
    order = ShuffledOrder(len(rows) - cfg.data.heldout_rows, seed=cfg.seed)
    losses = []
    for _ in range(num_steps):
        batch = _collate(tokenizer, [rows[index]["messages"] for index in order.next(cfg.data.batch_size)])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, opt.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def full_losses(cfg: RunConfig, *, num_steps: int) -> list[float]:
    """The losses of each step of a full fine-tuning, by transformers."""
    rows = [json.loads(line) for line in Path(cfg.data.name_or_path).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.name_or_path)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.name_or_path, dtype=torch.float32)
    # transformers drops the gradient of the padding token's embedding, which here is also the token that ends a turn.
    model.get_input_embeddings().padding_idx = None
    return _train(cfg, model, list(model.parameters()), tokenizer, rows, num_steps)


def _collate(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; labels are -100 but on the assistant's answer and the token that ends it."""
    inputs, labels = [], []
    for messages in conversations:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        inputs.append(torch.tensor(context + answer))
        labels.append(torch.tensor([-100] * len(context) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(inputs, batch_first=True),
        "attention_mask": pad([torch.ones_like(tokens) for tokens in inputs], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
