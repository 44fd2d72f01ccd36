"""Supervised fine-tuning: cross-entropy on what the assistant says in demonstrations, token mean over the batch.

There is no engine and no sampling. Prompts are not trained on: the loss mask is made where the chat template makes
the tokens. The held-out loss is measured on the data set's last rows, before training, every ``evaluation.every`` steps
and after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from framework.algorithms.supervised import CrossEntropy
from framework.batching import Batch, make_batch
from framework.config import RunConfig
from framework.data.datasets import open_rows
from framework.data.order import ShuffledOrder, check_batch_size, first_rows
from framework.data.supervised import Demonstrations, length_report
from framework.errors import DataError
from framework.metrics import reduce_metrics
from framework.progress import StopSignal, begin, end_step, finish, steady_mean
from framework.runtime import POLICY, Runtime
from framework.timing import PhaseTimer
from framework.types import Datum


def run(cfg: RunConfig, rt: Runtime) -> None:
    """Trains the adapter for ``cfg.num_steps`` steps; leaves the adapter and ``summary.json`` in the run's folder."""
    check_batch_size(cfg.data.batch_size, rt.mesh.dp_size)
    data = Demonstrations(
        open_rows(cfg.data.name_or_path, split=cfg.data.split),
        rt.chat,
        max_tokens=cfg.data.max_tokens,
        too_long=cfg.data.too_long,
    )
    num_train = len(data) - cfg.data.heldout_rows
    if num_train < 1:
        raise DataError(
            f"{cfg.data.name_or_path} has {len(data)} rows and data.heldout_rows={cfg.data.heldout_rows} are set "
            f"aside; nothing is left to train on"
        )
    heldout = [data.datum(index) for index in range(num_train, len(data))]
    order = ShuffledOrder(num_train, seed=cfg.seed, blocks=first_rows(data.blocks, num_train))
    progress = begin(cfg, rt, order)
    stop = StopSignal()
    if heldout and not progress.evaluations:
        progress.evaluations.append(evaluate(cfg, rt, heldout, step=0))
    history: list[dict[str, float]] = []
    for step in range(progress.step + 1, cfg.num_steps + 1):
        timer = PhaseTimer(rt.base.device.synchronize)
        with timer.phase("data"):
            mine = progress.order.next(cfg.data.batch_size)[rt.mesh.dp_rank :: rt.mesh.dp_size]
            datums = [data.datum(index) for index in mine]
        if not history and rt.mesh.rank == 0:
            budget = cfg.trainer.max_tokens_per_microbatch
            print(length_report(datums, max_tokens=cfg.data.max_tokens, max_tokens_per_microbatch=budget), flush=True)
        with timer.phase("forward_backward"):
            loss = rt.trainer.forward_backward(POLICY, batch_of(cfg, rt, datums), CrossEntropy())
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
    losses = progress.evaluations
    summary = {
        "eval/loss_start": losses[0] if losses else None,
        "eval/loss_end": losses[-1] if losses else None,
        "time/step_s": steady_mean(history, "time/step_s"),
    }
    finish(cfg, rt, summary)


def batch_of(cfg: RunConfig, rt: Runtime, datums: Sequence[Datum]) -> Batch:
    """This replica's microbatches, weighted by the global number of trained tokens."""
    return make_batch(
        datums,
        aggregation="token_mean",
        max_tokens=cfg.trainer.max_tokens_per_microbatch,
        multiple_of=rt.trainer.token_multiple,
        global_sum=lambda value: rt.mesh.global_sum([value])[0],
    )


def evaluate(cfg: RunConfig, rt: Runtime, heldout: Sequence[Datum], *, step: int) -> float:
    """Logs and returns the mean loss per held-out token."""
    logprobs = rt.trainer.forward(POLICY, batch_of(cfg, rt, heldout)).logprobs
    loss = -sum(float(values.sum()) for values in logprobs) / sum(len(values) for values in logprobs)
    rt.tracker.log(step, {"eval/loss": loss})
    return loss
