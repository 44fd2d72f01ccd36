"""Order, barriers, fairness: the scheduler as a pure decision."""

from __future__ import annotations

import pytest

from framework.service.ops import OptimStep, RemoveAdapter, Sample
from framework.service.plan import VersionKey
from framework.service.scheduler import Entry, Scheduler
from framework.types import AdamParams, Prompt, SamplingParams


def training(adapter: str, seq: int | None, tenant: str = "") -> Entry:
    return Entry(
        request_id=f"{adapter}:{seq}",
        kind="optim_step",
        tenant=tenant or adapter,
        op=OptimStep(params=AdamParams(learning_rate=0.1)),
        adapter_id=adapter,
        seq=seq,
    )


def sample(name: str, tenant: str, count: int = 1, version: VersionKey | None = None) -> Entry:
    op = Sample(
        prompt=Prompt(token_ids=(1,)), sampling=SamplingParams(max_tokens=4), num_samples=count, version=version
    )
    return Entry(request_id=name, kind="sample", tenant=tenant, op=op)


def resident(key: VersionKey | None) -> bool:
    return key is None or key[0] != "away"


def run(scheduler: Scheduler, seconds: float, now: float = 0.0) -> str:
    """Runs the next training entry to its end and returns its id."""
    entry = scheduler.next_decision(now, resident=resident).train
    assert entry is not None
    scheduler.charge_training(entry, seconds, now)
    scheduler.finish(entry)
    return entry.request_id


def test_requests_of_an_adapter_run_in_the_order_of_their_numbers() -> None:
    scheduler = Scheduler(max_in_flight=4)
    for seq in (2, 3, 0, 1):
        scheduler.add(training("a", seq), 0.0)
    assert [run(scheduler, 1.0) for _ in range(4)] == ["a:0", "a:1", "a:2", "a:3"]


def test_a_missing_number_holds_its_adapter_only_and_is_given_up_in_time() -> None:
    scheduler = Scheduler(max_in_flight=4)
    scheduler.add(training("a", 1), 10.0)
    scheduler.add(training("b", 0), 10.0)
    assert run(scheduler, 1.0) == "b:0"
    assert scheduler.next_decision(11.0, resident=resident).train is None
    assert scheduler.gaps(69.0, 60.0) == []
    [waiting] = scheduler.gaps(71.0, 60.0)
    assert [entry.request_id for entry in waiting.skip_gap(71.0)] == ["a:1"]
    scheduler.add(training("a", 2), 72.0)
    assert run(scheduler, 1.0) == "a:2"


def test_tenants_share_by_time_not_by_requests() -> None:
    scheduler = Scheduler(max_in_flight=4)
    for seq in range(20):
        scheduler.add(training("slow", seq), 0.0)
        scheduler.add(training("quick", seq), 0.0)
    spent = {"slow": 0.0, "quick": 0.0}
    for turn in range(16):
        entry = scheduler.next_decision(float(turn), resident=resident).train
        assert entry is not None
        seconds = 3.0 if entry.tenant == "slow" else 1.0
        spent[entry.tenant] += seconds
        scheduler.charge_training(entry, seconds, float(turn))
        scheduler.finish(entry)
    assert spent == {"slow": 12.0, "quick": 12.0}


def test_a_tenant_that_was_idle_brings_no_credit() -> None:
    scheduler = Scheduler(max_in_flight=4)
    for seq in range(8):
        scheduler.add(training("busy", seq), 0.0)
    for _ in range(4):
        run(scheduler, 10.0)
    for seq in range(4):
        scheduler.add(training("late", seq), 0.0)
    order = [run(scheduler, 10.0) for _ in range(4)]
    assert sorted(name.split(":")[0] for name in order) == ["busy", "busy", "late", "late"]


def test_training_and_sampling_of_two_tenants_alternate_by_time() -> None:
    scheduler = Scheduler(max_in_flight=4)
    for seq in range(30):
        scheduler.add(training("flood", seq), 0.0)
    scheduler.add(sample("s", "other"), 0.0)
    scheduler.started(scheduler.next_decision(0.0, resident=resident).submit, 0.0)
    steps = quanta = 0
    for turn in range(40):
        decision = scheduler.next_decision(float(turn), resident=resident)
        if decision.train is not None:
            scheduler.charge_training(decision.train, 2.0, float(turn))
            scheduler.finish(decision.train)
            quanta += 1
        if decision.step:
            scheduler.charge_step(0.5)
            steps += 1
    assert steps / quanta == pytest.approx(4.0, rel=0.2), "half the time each: four steps of 0.5 s per quantum of 2 s"


def test_the_engine_is_shared_between_tenants_that_sample() -> None:
    scheduler = Scheduler(max_in_flight=8)
    scheduler.add(sample("flood", "a", count=100), 0.0)
    first = scheduler.next_decision(0.0, resident=resident).submit
    assert len(first) == 8, "alone it may have all of it"
    scheduler.started(first, 0.0)
    scheduler.add(sample("one", "b"), 1.0)
    assert scheduler.next_decision(1.0, resident=resident).submit == ()
    scheduler.ended("a")
    [next_in] = scheduler.next_decision(2.0, resident=resident).submit
    assert next_in.entry.request_id == "one"
    scheduler.started((next_in,), 2.0)
    scheduler.ended("b")
    assert scheduler.next_decision(3.0, resident=resident).submit == (), "b's share stays free for a while"
    assert len(scheduler.next_decision(60.0, resident=resident).submit) == 1


def test_a_version_that_is_away_is_asked_for_and_does_not_hold_others() -> None:
    scheduler = Scheduler(max_in_flight=8)
    scheduler.add(sample("x", "a", version=("away", 3)), 0.0)
    scheduler.add(sample("y", "a"), 0.0)
    decision = scheduler.next_decision(0.0, resident=resident)
    assert decision.wants_slot == ("away", 3)
    assert [part.entry.request_id for part in decision.submit] == ["y"]


def test_a_blocked_adapter_lets_the_next_run_and_cancel_empties_the_queue() -> None:
    scheduler = Scheduler(max_in_flight=8)
    scheduler.add(training("a", 0), 0.0)
    scheduler.add(training("b", 0), 0.0)
    decision = scheduler.next_decision(0.0, resident=resident, blocked=frozenset({"a"}))
    assert decision.train is not None
    assert decision.train.request_id == "b:0"
    scheduler.add(sample("s", "c", count=5), 0.0)
    assert scheduler.cancel("s") == 5
    assert not scheduler.next_decision(0.0, resident=resident).submit


def test_an_entry_without_a_number_goes_behind_what_is_ready() -> None:
    scheduler = Scheduler(max_in_flight=8)
    scheduler.add(training("a", 0), 0.0)
    last = Entry(request_id="r", kind="x", tenant="a", op=RemoveAdapter(), adapter_id="a")
    scheduler.add(last, 0.0)
    assert [run(scheduler, 1.0), run(scheduler, 1.0)] == ["a:0", "r"]


def test_who_used_an_idle_machine_does_not_owe_it_to_a_newcomer() -> None:
    scheduler = Scheduler(max_in_flight=8)
    for seq in range(5):
        scheduler.add(training("early", seq), 0.0)
        run(scheduler, 10.0)
    for seq in range(4):
        scheduler.add(training("late", seq), 0.0)
    assert run(scheduler, 10.0) == "late:0"
    scheduler.add(training("early", 5), 0.0)
    assert run(scheduler, 10.0) == "early:5"


def test_a_tenant_with_one_request_at_a_time_keeps_its_half_beside_long_quanta() -> None:
    scheduler = Scheduler(max_in_flight=8)
    for seq in range(20):
        scheduler.add(training("flood", seq), 0.0)
    spent, now, seq = {"flood": 0.0, "small": 0.0}, 0.0, 0
    scheduler.add(training("small", seq), now)
    while now < 20.0:
        decision = scheduler.next_decision(now, resident=resident)
        entry = decision.train
        assert entry is not None
        wait = scheduler.patience(decision, now)
        if wait:  # the client answers in half of that
            now += wait / 2
            scheduler.add(training("small", seq), now)
            continue
        seconds = 2.0 if entry.tenant == "flood" else 0.25
        now += seconds
        spent[entry.tenant] += seconds
        scheduler.charge_training(entry, seconds, now)
        scheduler.finish(entry)
        if entry.tenant == "small":
            scheduler.answered("small", now)
            seq += 1
        elif not scheduler.queues["small"].ready:  # it came while the quantum ran
            scheduler.add(training("small", seq), now)
    assert spent["small"] == pytest.approx(spent["flood"], abs=2.5)


def test_patience_is_only_for_those_behind_and_for_a_moment() -> None:
    scheduler = Scheduler(max_in_flight=8)
    for name in ("flood", "small"):
        scheduler.add(training(name, 0), 0.0)
        scheduler.add(training(name, 1), 0.0)
    scheduler.charge_training(training("flood", 0), 2.0, 0.0)
    run(scheduler, 0.5)
    scheduler.answered("small", 10.0)
    decision = scheduler.next_decision(10.0, resident=resident)
    assert decision.train is not None
    assert decision.train.tenant == "small", "it has another one"
    assert scheduler.patience(decision, 10.0) == 0.0
    run(scheduler, 0.5)
    decision = scheduler.next_decision(10.0, resident=resident)
    assert scheduler.patience(decision, 10.004) == pytest.approx(0.006)
    assert scheduler.patience(decision, 10.02) == 0.0
