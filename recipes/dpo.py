"""Direct preference optimisation: pairs of a chosen and a rejected answer, no reward model, no sampling.

The reference is the same model with the adapter off, so its logprobs cost one forward pass and no memory. A pair stays
in one microbatch; the loss is the mean over the pairs of the global batch. The held-out loss and how often the chosen
answer is preferred are measured on the data set's last rows. IPO, KTO and other relatives are left out: another loss
over the same pairs is a function like ``framework.algorithms.preference.DPO``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from framework.algorithms.datums import trained_values, with_field
from framework.algorithms.preference import dpo_pair_loss
from framework.batching import Batch, make_batch
from framework.config import RunConfig
from framework.data.datasets import open_rows
from framework.data.order import ShuffledOrder, check_batch_size, first_rows
from framework.data.supervised import Preferences, length_report
from framework.errors import ConfigError, DataError
from framework.metrics import reduce_metrics
from framework.progress import StopSignal, begin, end_step, finish, steady_mean
from framework.runtime import POLICY, Runtime
from framework.timing import PhaseTimer
from framework.types import Datum


def run(cfg: RunConfig, rt: Runtime) -> None:
    """Trains the adapter for ``cfg.num_steps`` steps; leaves the adapter and ``summary.json`` in the run's folder."""
    if cfg.lora is None:
        raise ConfigError("lora=none: DPO compares with the base model, which full fine-tuning changes; use an adapter")
    check_batch_size(cfg.data.batch_size, rt.mesh.dp_size)
    rows = open_rows(cfg.data.name_or_path, split=cfg.data.split)
    data = Preferences(rows, rt.chat, max_tokens=cfg.data.max_tokens, too_long=cfg.data.too_long)
    num_train = len(data) - cfg.data.heldout_rows
    if num_train < cfg.data.batch_size:
        raise DataError(
            f"{cfg.data.name_or_path} has {len(data)} rows and data.heldout_rows={cfg.data.heldout_rows} are set "
            f"aside; what is left is less than one batch of data.batch_size={cfg.data.batch_size}"
        )
    order = ShuffledOrder(num_train, seed=cfg.seed, blocks=first_rows(data.blocks, num_train))
    progress = begin(cfg, rt, order)
    heldout = with_reference(cfg, rt, pairs(data, range(num_train, len(data))))
    stop = StopSignal()
    if heldout and not progress.evaluations:
        progress.evaluations.append(evaluate(cfg, rt, heldout, step=0))
    history: list[dict[str, float]] = []
    for step in range(progress.step + 1, cfg.num_steps + 1):
        timer = PhaseTimer(rt.base.device.synchronize)
        with timer.phase("data"):
            datums = pairs(data, progress.order.next(cfg.data.batch_size)[rt.mesh.dp_rank :: rt.mesh.dp_size])
        if not history and rt.mesh.rank == 0:
            budget = cfg.trainer.max_tokens_per_microbatch
            print(length_report(datums, max_tokens=cfg.data.max_tokens, max_tokens_per_microbatch=budget), flush=True)
        with timer.phase("reference"):
            datums = with_reference(cfg, rt, datums)
        with timer.phase("forward_backward"):
            loss = rt.trainer.forward_backward(POLICY, batch_of(cfg, rt, datums), cfg.dpo)
        adam = cfg.optimizer.at(step, cfg.num_steps)
        with timer.phase("optim"):
            optim = rt.trainer.optim_step(POLICY, adam)
        metrics = reduce_metrics([loss.metrics], global_sum=rt.mesh.global_sum)
        total_loss, num_tokens = rt.mesh.global_sum([loss.loss, float(sum(len(d.token_ids) for d in datums))])
        metrics |= {**timer.seconds, "time/step_s": timer.total(), "loss/total": total_loss}
        metrics |= {"optim/grad_norm": optim.grad_norm, "optim/learning_rate": adam.learning_rate}
        metrics |= {"time/tokens_per_s": num_tokens / timer.total()}
        rt.tracker.log(step, metrics)
        history.append(metrics)
        if heldout and (step == cfg.num_steps or (cfg.evaluation.every and step % cfg.evaluation.every == 0)):
            progress.evaluations.append(evaluate(cfg, rt, heldout, step=step))
        progress.step = step
        if end_step(cfg, rt, progress, stop):
            return
    preferred = progress.evaluations
    summary = {
        "eval/preference_accuracy_start": preferred[0] if preferred else None,
        "eval/preference_accuracy_end": preferred[-1] if preferred else None,
        "time/step_s": steady_mean(history, "time/step_s"),
    }
    finish(cfg, rt, summary)


def pairs(data: Preferences, indices: Sequence[int]) -> tuple[Datum, ...]:
    """These rows as chosen, rejected, chosen, rejected, ..."""
    both = [data.pair(index) for index in indices]
    return tuple(datum for pair in both for datum in (pair.chosen, pair.rejected))


def with_reference(cfg: RunConfig, rt: Runtime, datums: Sequence[Datum]) -> tuple[Datum, ...]:
    """Adds ``ref_logprobs``: those of the base model."""
    if not datums:
        return ()
    return with_field(datums, "ref_logprobs", rt.trainer.forward(None, batch_of(cfg, rt, datums)).logprobs)


def batch_of(cfg: RunConfig, rt: Runtime, datums: Sequence[Datum]) -> Batch:
    """This replica's microbatches, weighted for the mean over the global batch's pairs."""
    return make_batch(
        datums,
        aggregation="sequence_mean",
        max_tokens=cfg.trainer.max_tokens_per_microbatch,
        multiple_of=rt.trainer.token_multiple,
        keep_together=2,
        global_sum=lambda value: rt.mesh.global_sum([value])[0],
    )


def evaluate(cfg: RunConfig, rt: Runtime, heldout: Sequence[Datum], *, step: int) -> float:
    """Logs the held-out loss and margin; returns the fraction of held-out pairs whose chosen answer is preferred.

    Preferred means that log(pi / ref) is larger than the rejected answer's; an even pair, as all are before the first
    step, counts half.
    """
    logprobs = rt.trainer.forward(POLICY, batch_of(cfg, rt, heldout)).logprobs
    ref_logprobs = [trained_values(datum, "ref_logprobs") for datum in heldout]
    ratios = np.array(
        [mine.sum(dtype=np.float64) - ref.sum() for mine, ref in zip(logprobs, ref_logprobs, strict=True)]
    )
    margins = torch.from_numpy(ratios[0::2] - ratios[1::2])
    losses = dpo_pair_loss(margins, beta=cfg.dpo.beta, label_smoothing=cfg.dpo.label_smoothing)
    accuracy = float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())
    metrics = {"eval/loss": float(losses.mean()), "eval/preference_accuracy": accuracy}
    rt.tracker.log(step, metrics | {"eval/reward_margin": cfg.dpo.beta * float(margins.mean())})
    return accuracy
