"""On-policy distillation: the student samples, the teacher says how likely it finds each token, the student follows.

The advantage of a token is log teacher - log student, so the expected gradient is that of the per-token reverse KL
(Agarwal et al. 2024, arXiv 2306.13649; Thinking Machines, "On-policy distillation", 2025). Rewards are reported and not
trained on. The teacher is ``distill.teacher``: an adapter of the same base, which costs its factors only, or another
model with the same tokenizer, which transformers computes on every rank. Distillation on the teacher's samples is
``recipes/sft.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from framework.algorithms.datums import rollouts_of, to_datum, with_field
from framework.algorithms.supervised import OnPolicyDistillation
from framework.batching import Batch, make_batch
from framework.config import RunConfig
from framework.data.order import ShuffledOrder
from framework.environments.base import Problems
from framework.environments.catalog import build_problems
from framework.errors import ConfigError
from framework.lora.peft_io import CONFIG_FILE, load_peft
from framework.metrics import reduce_metrics
from framework.pair import open_teacher
from framework.parity import check_parity, measure_parity
from framework.progress import StopSignal, begin, end_step, finish
from framework.rollout import CollectResult, collect
from framework.runtime import POLICY, SamplingRuntime
from framework.timing import PhaseTimer
from framework.trainer.base import ForwardResult
from framework.types import AdapterRef, Datum, SamplingParams
from recipes.grpo import evaluate, summary, table

TEACHER = "teacher"
Teacher = Callable[[Sequence[Datum]], ForwardResult]
"""Logprobs of the student's tokens, at the temperature they were sampled at."""


def run(cfg: RunConfig, rt: SamplingRuntime) -> None:
    """Trains the adapter for ``cfg.num_steps`` steps; leaves the adapter and ``summary.json`` in the run's folder."""
    cfg.rollout.check_replicas(rt.mesh.dp_size)
    problems = build_problems(cfg.environment, rt.chat, split="train", seed=cfg.seed)
    heldout = build_problems(cfg.environment, rt.chat, split="heldout", seed=cfg.seed)
    teacher = teacher_of(cfg, rt)
    progress = begin(cfg, rt, ShuffledOrder(len(problems), seed=cfg.seed))
    stop = StopSignal()
    ref = rt.weight_sync.push(POLICY)
    if not progress.evaluations:
        progress.evaluations.append(evaluate(cfg, rt, heldout, ref, step=0))
    history: list[dict[str, float]] = []
    for step in range(progress.step + 1, cfg.num_steps + 1):
        timer = PhaseTimer(rt.base.device.synchronize)
        with timer.phase("rollout"):
            result = sample(cfg, rt, problems, progress.order, ref, step)
        with timer.phase("sleep"):
            rt.sleep()
        datums = tuple(to_datum(rollout) for rollout in rollouts_of(result.groups))
        with timer.phase("teacher"):
            datums = with_field(datums, "teacher_logprobs", teacher(datums).logprobs)
        with timer.phase("forward_backward"):
            batch = batch_of(cfg, rt, datums, multiple_of=rt.trainer.token_multiple, version=ref)
            loss = rt.trainer.forward_backward(POLICY, batch, OnPolicyDistillation())
        parity = measure_parity(datums, loss.result, rt.mesh)
        check_parity(parity, cfg.parity_gate, step=step)
        adam = cfg.optimizer.at(step, cfg.num_steps)
        with timer.phase("optim"):
            optim = rt.trainer.optim_step(POLICY, adam)
        with timer.phase("push"):
            ref = rt.weight_sync.push(POLICY)
        with timer.phase("wake"):
            rt.wake()
        parts = [result.metrics, loss.metrics]
        metrics = reduce_metrics(parts, global_sum=rt.mesh.global_sum, gather=rt.mesh.all_gather)
        total_loss, num_tokens = rt.mesh.global_sum([loss.loss, float(sum(len(d.token_ids) for d in datums))])
        metrics |= {**parity, **timer.seconds, "time/step_s": timer.total(), "loss/total": total_loss}
        metrics |= {"optim/grad_norm": optim.grad_norm, "optim/learning_rate": adam.learning_rate}
        metrics |= {"time/tokens_per_s": num_tokens / timer.total()}
        rt.tracker.log(step, metrics)
        history.append(metrics)
        if step == cfg.num_steps or (cfg.evaluation.every and step % cfg.evaluation.every == 0):
            progress.evaluations.append(evaluate(cfg, rt, heldout, ref, step=step))
            rt.tracker.log_table(step, "rollouts", *table(rt, result))
        progress.step = step
        if end_step(cfg, rt, progress, stop):
            return
    kl = [metrics["policy/reverse_kl"] for metrics in history]
    measured = {"policy/reverse_kl_start": kl[0], "policy/reverse_kl_end": kl[-1]} if kl else {}
    finish(cfg, rt, {**summary(progress.evaluations, history), **measured, "teacher": cfg.distill.teacher})


def teacher_of(cfg: RunConfig, rt: SamplingRuntime) -> Teacher:
    """The configured teacher: an adapter beside the student's, or a model of its own.

    Raises:
        ConfigError: none is configured, or its tokenizer is another.
    """
    if cfg.distill.teacher is None:
        raise ConfigError("distill.teacher is not set: it must be an adapter's folder or a model")
    folder = Path(cfg.distill.teacher).expanduser()
    if (folder / CONFIG_FILE).is_file():
        with rt.mesh.agree_on_error("reading the teacher"):
            spec, tensors = load_peft(folder)
        rt.trainer.add_adapter(TEACHER, spec, seed=0)
        rt.trainer.import_adapter(TEACHER, tensors)
        trainer, name = rt.trainer, TEACHER
    else:
        trainer, name = open_teacher(rt.base, cfg.distill.teacher), None
    return lambda datums: trainer.forward(name, batch_of(cfg, rt, datums, multiple_of=trainer.token_multiple))


def sample(
    cfg: RunConfig, rt: SamplingRuntime, problems: Problems, order: ShuffledOrder, ref: AdapterRef, step: int
) -> CollectResult:
    """This replica's rollouts of one step."""
    mesh, rollout = rt.mesh, cfg.rollout
    return collect(
        rt.engine,
        ref,
        problems,
        order.next(rollout.prompts_per_step)[mesh.dp_rank :: mesh.dp_size],
        group_size=rollout.group_size,
        sampling=SamplingParams(max_tokens=cfg.sampling.max_tokens, temperature=cfg.sampling.temperature),
        seed=cfg.seed,
        step=step,
        coordinator=mesh,
        timeout_s=rollout.timeout_s,
        max_turns=rollout.max_turns,
    )


def batch_of(
    cfg: RunConfig, rt: SamplingRuntime, datums: Sequence[Datum], *, multiple_of: int, version: AdapterRef | None = None
) -> Batch:
    """This replica's microbatches, weighted by the global number of sampled tokens."""
    return make_batch(
        datums,
        aggregation="token_mean",
        max_tokens=cfg.trainer.max_tokens_per_microbatch,
        multiple_of=multiple_of,
        temperature=cfg.sampling.temperature,
        global_sum=lambda value: rt.mesh.global_sum([value])[0],
        version=version,
    )
