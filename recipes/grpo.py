"""GRPO and its relatives: sample groups, score them, make one policy-gradient step, push the adapter, again.

One optimizer step per batch of samples unless ``rollout.max_lag`` says otherwise: the samples are then on-policy, and
the engine's logprobs are the only ones needed. With ``rollout.max_lag=n`` a batch is trained on in n + 1 parts, one
optimizer step and one version each; the last part's samples are n versions old, and ratios are against the trainer's
logprobs from before the first. Value networks, replay and asynchronous sampling are left out. What differs between
GRPO, Dr. GRPO, DAPO, RLOO and the others is in ``algorithm``; what is sampled is in ``environment``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

from framework.algorithms.algorithm import Algorithm
from framework.algorithms.base import Metric
from framework.algorithms.catalog import build_algorithm
from framework.algorithms.datums import with_field
from framework.batching import Batch, make_batch
from framework.config import RunConfig
from framework.data.order import ShuffledOrder
from framework.environments.base import Problems
from framework.environments.catalog import build_problems
from framework.errors import ConfigError
from framework.evaluation import greedy_accuracy
from framework.metrics import reduce_metrics
from framework.parity import check_parity, measure_parity
from framework.progress import StopSignal, begin, end_step, finish, steady_mean
from framework.rollout import CollectResult, collect, collect_filtered, sample_rows
from framework.runtime import POLICY, SamplingRuntime
from framework.timing import PhaseTimer
from framework.trainer.base import ForwardBackwardResult
from framework.types import AdapterRef, Datum, RolloutGroup, SamplingParams


def run(cfg: RunConfig, rt: SamplingRuntime) -> None:
    """Trains the adapter for ``cfg.num_steps`` steps; leaves the adapter and ``summary.json`` in the run's folder."""
    cfg.rollout.check_replicas(rt.mesh.dp_size)
    algorithm = build_algorithm(cfg.algorithm, max_tokens=cfg.sampling.max_tokens)
    check_reference(cfg, algorithm)
    problems = build_problems(cfg.environment, rt.chat, split="train", seed=cfg.seed)
    heldout = build_problems(cfg.environment, rt.chat, split="heldout", seed=cfg.seed)
    progress = begin(cfg, rt, ShuffledOrder(len(problems), seed=cfg.seed))
    stop = StopSignal()
    ref = rt.weight_sync.push(POLICY)
    if not progress.evaluations:
        progress.evaluations.append(evaluate(cfg, rt, heldout, ref, step=0))
    history: list[dict[str, float]] = []
    for step in range(progress.step + 1, cfg.num_steps + 1):
        timer = PhaseTimer(rt.base.device.synchronize)
        with timer.phase("rollout"):
            result = sample(cfg, rt, algorithm, problems, progress.order, ref, step)
        with timer.phase("verify"):
            rt.weight_sync.verify(ref)  # the samples came from the weights about to be updated
        with timer.phase("sleep"):
            rt.sleep()
        datums, seen = make_datums(cfg, rt, algorithm, result.groups, ref, timer)
        losses: list[ForwardBackwardResult] = []
        adam = cfg.optimizer.at(step, cfg.num_steps)
        for part in split(datums, cfg.rollout.max_lag + 1):
            check_trainable(rt, part, step=step)
            with timer.phase("forward_backward"):
                batch = batch_of(cfg, rt, algorithm, part, ref)
                losses.append(rt.trainer.forward_backward(POLICY, batch, algorithm.loss))
            if len(losses) == 1:  # later parts meet other weights than those they were sampled from
                parity = measure_parity(part, losses[0].result, rt.mesh)
                check_parity(parity, cfg.parity_gate, step=step)
            with timer.phase("optim"):
                optim = rt.trainer.optim_step(POLICY, adam)
            with timer.phase("push"):
                ref = rt.weight_sync.push(POLICY)
        with timer.phase("wake"):
            rt.wake()
        parts = [result.metrics, seen, *(loss.metrics for loss in losses)]
        metrics = reduce_metrics(parts, global_sum=rt.mesh.global_sum, gather=rt.mesh.all_gather)
        mean_loss = sum(loss.loss for loss in losses) / len(losses)
        total_loss, num_tokens = rt.mesh.global_sum([mean_loss, float(sum(len(d.token_ids) for d in datums))])
        metrics |= {**parity, **timer.seconds, "time/step_s": timer.total(), "loss/total": total_loss}
        metrics |= {"optim/grad_norm": optim.grad_norm, "optim/learning_rate": adam.learning_rate}
        metrics["sync/version"] = float(ref.version)
        metrics |= {"time/tokens_per_s": num_tokens / timer.total()}
        rt.tracker.log(step, metrics)
        history.append(metrics)
        if step == cfg.num_steps or (cfg.evaluation.every and step % cfg.evaluation.every == 0):
            progress.evaluations.append(evaluate(cfg, rt, heldout, ref, step=step))
            rt.tracker.log_table(step, "rollouts", *table(rt, result))
        progress.step = step
        if end_step(cfg, rt, progress, stop):
            return
    finish(cfg, rt, summary(progress.evaluations, history))


def sample(
    cfg: RunConfig,
    rt: SamplingRuntime,
    algorithm: Algorithm,
    problems: Problems,
    order: ShuffledOrder,
    ref: AdapterRef,
    step: int,
) -> CollectResult:
    """This replica's groups of one step; with dynamic sampling, only groups whose rewards differ."""
    mesh, rollout = rt.mesh, cfg.rollout
    play = partial(
        collect,
        rt.engine,
        ref,
        problems,
        group_size=rollout.group_size,
        sampling=SamplingParams(max_tokens=cfg.sampling.max_tokens, temperature=cfg.sampling.temperature),
        seed=cfg.seed,
        step=step,
        coordinator=mesh,
        timeout_s=rollout.timeout_s,
        max_turns=rollout.max_turns,
    )

    def draw(count: int) -> Sequence[int]:
        return order.next(count * mesh.dp_size)[mesh.dp_rank :: mesh.dp_size]

    num_groups = rollout.prompts_per_step // mesh.dp_size
    if not algorithm.dynamic_sampling:
        return play(draw(num_groups))
    return collect_filtered(
        lambda indices, attempt: play(indices, attempt=attempt),
        draw,
        num_groups=num_groups,
        max_rounds=rollout.max_refills,
        largest=lambda value: max(mesh.all_gather(value)),
    )


def make_datums(
    cfg: RunConfig,
    rt: SamplingRuntime,
    algorithm: Algorithm,
    groups: Sequence[RolloutGroup],
    ref: AdapterRef,
    timer: PhaseTimer,
) -> tuple[tuple[Datum, ...], Mapping[str, Metric]]:
    """One datum per rollout with all that the loss reads: advantages, and logprobs of the base model and of the trainer
    as it sampled, where they are used."""
    datums = algorithm.datums(groups)
    sources: dict[str, str | None] = {"ref_logprobs": None} if algorithm.needs_ref_logprobs else {}
    if cfg.rollout.max_lag:
        sources["proximal_logprobs"] = POLICY
    for name, adapter in sources.items():
        with timer.phase("reference"):
            logprobs = rt.trainer.forward(adapter, batch_of(cfg, rt, algorithm, datums, ref)).logprobs
        datums = with_field(datums, name, logprobs)
    advantages = algorithm.advantages(groups, datums, global_sum=lambda x: rt.mesh.global_sum([x])[0])
    return with_field(datums, "advantages", advantages.values), advantages.metrics


def split(datums: Sequence[Datum], count: int) -> tuple[tuple[Datum, ...], ...]:
    """``count`` runs of neighbours, as even as can be."""
    cuts = [len(datums) * i // count for i in range(count + 1)]
    return tuple(tuple(datums[start:end]) for start, end in pairwise(cuts))


def check_reference(cfg: RunConfig, algorithm: Algorithm) -> None:
    """Refuses a KL penalty against a base model that is trained away.

    Raises:
        ConfigError: naming the keys.
    """
    if cfg.lora is None and algorithm.needs_ref_logprobs:
        raise ConfigError(
            "lora=none trains the base model itself, so none is left for algorithm.kl_coef to compare with; set "
            "algorithm.kl_coef=0, or train an adapter"
        )


def check_trainable(rt: SamplingRuntime, datums: Sequence[Datum], *, step: int) -> None:
    """Refuses a step without one token to train on, which would move the adapter by old momentum alone.

    Raises:
        ConfigError: every rollout of every replica was cut by the token limit, and the overlong filter took them out.
    """
    (num_trained,) = rt.mesh.global_sum([float(sum(sum(datum.loss_mask) for datum in datums))])
    if not num_trained:
        raise ConfigError(
            f"step {step}: every rollout was cut at the token limit and algorithm.overlong_filter leaves none to train "
            f"on; raise sampling.max_tokens, or set algorithm.overlong_filter=false"
        )


def batch_of(
    cfg: RunConfig, rt: SamplingRuntime, algorithm: Algorithm, datums: Sequence[Datum], ref: AdapterRef
) -> Batch:
    """This replica's microbatches, weighted for the global batch."""
    return make_batch(
        datums,
        aggregation=algorithm.aggregation,
        constant=float(algorithm.max_tokens),
        max_tokens=cfg.trainer.max_tokens_per_microbatch,
        multiple_of=rt.trainer.token_multiple,
        temperature=cfg.sampling.temperature,
        global_sum=lambda value: rt.mesh.global_sum([value])[0],
        version=ref,
        max_lag=cfg.rollout.max_lag,
    )


def evaluate(cfg: RunConfig, rt: SamplingRuntime, problems: Problems, ref: AdapterRef, *, step: int) -> float:
    """Logs and returns the greedy accuracy of this version; the same problems every time."""
    mesh = rt.mesh
    indices = range(min(cfg.evaluation.num_problems, len(problems)))[mesh.dp_rank :: mesh.dp_size]
    mine = greedy_accuracy(
        rt.engine,
        ref,
        problems,
        indices,
        max_tokens=cfg.sampling.max_tokens,
        coordinator=mesh,
        max_turns=cfg.rollout.max_turns,
    )
    correct, count = mesh.global_sum([mine * len(indices), float(len(indices))])
    rt.tracker.log(step, {"eval/accuracy": correct / count})
    return correct / count


def table(rt: SamplingRuntime, result: CollectResult) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
    """A few rollouts as text."""
    rows = sample_rows(result.groups, rt.chat.decode, limit=8)
    return ("problem", "prompt", "completion", "reward", "adapter", "content_hash"), [
        (r.problem_id, r.prompt, r.completion, r.reward, r.adapter, r.content_hash) for r in rows
    ]


def summary(accuracy: Sequence[float], history: Sequence[dict[str, float]]) -> dict[str, float]:
    """What ``summary.json`` says of the run, besides what every run's says."""
    return {
        "eval/accuracy_start": accuracy[0],
        "eval/accuracy_end": accuracy[-1],
        "time/step_s": steady_mean(history, "time/step_s"),
        "time/push_s": steady_mean(history, "time/push_s"),
        "time/generate_s": steady_mean(history, "time/generate_s"),
        "time/train_s": steady_mean(history, "time/forward_backward_s", "time/optim_s"),
        "parity/logprob_abs_diff_mean": steady_mean(history, "parity/logprob_abs_diff_mean"),
    }
