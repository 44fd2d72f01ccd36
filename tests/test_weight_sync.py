"""Proof of delivery: whatever goes wrong between trainer and slot ends with a DeliveryError that names the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.errors import DeliveryError, LockstepError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard
from framework.types import AdapterRef
from framework.weight_sync import VersionCounter, WeightSync, check_delivery, content_hash

SPEC = LoraSpec(rank=4, targets=("q_proj", "v_proj", "down_proj"))
SIZES = {"q_proj": (24, 16), "k_proj": (8, 16), "v_proj": (8, 16), "down_proj": (16, 40)}
"""``[out, in]`` of every projection that has a slot."""
PATHS = [f"model.layers.{n}.{'mlp' if 'down' in t else 'self_attn'}.{t}" for n in range(3) for t in SIZES]
MAX_RANK, NUM_SLOTS = 8, 2
Q1 = "model.layers.1.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def target(path: str) -> str:
    return path.rpartition(".")[2]


class FactorTrainer:
    """As much of a trainer as a push sees: bf16 factors that ``train`` changes."""

    def __init__(self) -> None:
        self.factors = {p: self._make(p) for p in PATHS if target(p) in SPEC.targets}

    @staticmethod
    def _make(path: str) -> LoraShard:
        out, width = SIZES[target(path)]
        return LoraShard(a=torch.randn(SPEC.rank, width).bfloat16(), b=torch.randn(out, SPEC.rank).bfloat16())

    def train(self) -> None:
        for shard in self.factors.values():
            shard.b.mul_(1.0078125)  # the next bf16 value or the one after

    def adapters(self) -> Mapping[str, LoraSpec]:
        return {"policy": SPEC}

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        return self.factors


class SlotEngine:
    """As much of an engine as a push sees: stacked slots, as wide as the largest rank, and who has which."""

    def __init__(self) -> None:
        self.a = {p: torch.zeros(NUM_SLOTS, MAX_RANK, SIZES[target(p)][1], dtype=torch.bfloat16) for p in PATHS}
        self.b = {p: torch.zeros(NUM_SLOTS, SIZES[target(p)][0], MAX_RANK, dtype=torch.bfloat16) for p in PATHS}
        self.slot_of: dict[AdapterRef, int] = {}
        self.ranks: dict[AdapterRef, int] = {}

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        slot = min(set(range(NUM_SLOTS)) - set(self.slot_of.values()))
        self.slot_of[ref], self.ranks[ref] = slot, spec.rank
        for path in PATHS:
            self.a[path][slot].zero_()
            self.b[path][slot].zero_()
            if path in shards:
                self.a[path][slot, : spec.rank] = shards[path].a
                self.b[path][slot, :, : spec.rank] = shards[path].b

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        slot, rank = self.slot_of[ref], self.ranks[ref]
        return {p: LoraShard(a=self.a[p][slot, :rank], b=self.b[p][slot, :, :rank]) for p in PATHS}

    def unload_adapter(self, ref: AdapterRef) -> None:
        del self.slot_of[ref], self.ranks[ref]


class Pair:
    """A trainer, an engine and the sync between them."""

    def __init__(self, engine: SlotEngine | None = None) -> None:
        torch.manual_seed(0)
        self.trainer, self.engine = FactorTrainer(), engine or SlotEngine()
        self.compared: list[tuple[str, object]] = []
        self.sync = WeightSync(
            self.trainer,  # type: ignore[arg-type]
            self.engine,  # type: ignore[arg-type]
            VersionCounter(),
            synchronize=lambda: None,
            check_lockstep=lambda what, value: self.compared.append((what, value)),
        )


def test_a_push_is_a_new_version_with_a_hash_of_its_bytes_and_unloads_the_last() -> None:
    pair = Pair()
    first = pair.sync.push("policy")
    pair.trainer.train()
    second = pair.sync.push("policy")
    assert (first.version, second.version) == (1, 2)
    assert first.content_hash != second.content_hash == content_hash(pair.trainer.factors)
    assert list(pair.engine.slot_of) == [second]
    assert [what for what, _ in pair.compared] == ["push", "push"]
    assert pair.compared[0][1] == ("policy", SPEC, 1)
    pair.sync.verify(second)


def test_version_numbers_are_never_handed_out_twice() -> None:
    versions = VersionCounter(last=6)
    assert [versions.next() for _ in range(3)] == [7, 8, 9]
    pair = Pair()
    pair.sync.push("policy")
    pair.sync.release("policy")
    assert pair.engine.slot_of == {}
    assert pair.sync.push("policy").version == 2


def test_ranks_that_disagree_push_nothing() -> None:
    pair = Pair()

    def disagree(what: str, value: object) -> None:
        raise LockstepError("the ranks disagree")

    pair.sync._check_lockstep = disagree
    with pytest.raises(LockstepError):
        pair.sync.push("policy")
    assert pair.engine.slot_of == {}


def drop(shards: dict[str, LoraShard]) -> None:
    del shards[V1]


def rename(shards: dict[str, LoraShard]) -> None:
    shards[V1.replace("v_proj", "vv_proj")] = shards.pop(V1)


def add(shards: dict[str, LoraShard]) -> None:
    shards["model.layers.9.self_attn.v_proj"] = FactorTrainer._make(V1)


def duplicate(shards: dict[str, LoraShard]) -> None:
    shards[V1] = shards["model.layers.0.self_attn.v_proj"]


def cut(shards: dict[str, LoraShard]) -> None:
    shards[V1] = LoraShard(a=shards[V1].a[:, :8], b=shards[V1].b)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop, f"{V1} was not pushed"),
        (rename, f"{V1} was not pushed"),
        (add, "model.layers.9.self_attn.v_proj has no slot"),
        (duplicate, f"as model.layers.0.self_attn.v_proj and as {V1}"),
        (cut, f"{V1} has another shape"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_set_of_modules_is_named(change: Callable[[dict[str, LoraShard]], None], named: str) -> None:
    pair = Pair(EngineThatTakesAnything())
    change(pair.trainer.factors)
    with pytest.raises(DeliveryError, match=f"policy@1: .*{named}"):
        pair.sync.push("policy")


class EngineThatTakesAnything(SlotEngine):
    """Copies what fits and says nothing about the rest."""

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        fits = {p: s for p, s in shards.items() if p in PATHS and s.a.shape[1] == SIZES[target(p)][1]}
        super().load_adapter(ref, spec, fits)


class EngineThatForgets(SlotEngine):
    """Loads nothing into one module."""

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        super().load_adapter(ref, spec, {path: shard for path, shard in shards.items() if path != V1})


class EngineThatSharesASlice(SlotEngine):
    """Two modules of one layer lie in the same memory, so the one copied last wins."""

    def __init__(self) -> None:
        super().__init__()
        self.a[V1] = self.a[Q1]


class EngineThatSkipsLoads(SlotEngine):
    """Binds the new version to the slot and leaves the old content there."""

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        if not any(tensor.any() for tensor in self.b.values()):
            super().load_adapter(ref, spec, shards)
        self.slot_of[ref], self.ranks[ref] = 0, spec.rank


class EngineThatLeavesRows(SlotEngine):
    """Does not clear what an earlier adapter left in a module that this one does not have."""

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        super().load_adapter(ref, spec, shards)
        self.b["model.layers.2.self_attn.k_proj"][self.slot_of[ref], 3, 1] = 2.0**-20


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (EngineThatForgets(), V1),
        (EngineThatSharesASlice(), Q1),
        (EngineThatLeavesRows(), "model.layers.2.self_attn.k_proj"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_slot_is_named_at_the_push(engine: SlotEngine, named: str) -> None:
    with pytest.raises(DeliveryError, match=f"policy@1: .*{named}"):
        Pair(engine).sync.push("policy")


def test_a_load_that_changed_nothing_is_named() -> None:
    pair = Pair(EngineThatSkipsLoads())
    pair.sync.push("policy")
    pair.trainer.train()
    with pytest.raises(DeliveryError, match=f"policy@2: .* differs .*{PATHS[0]}"):
        pair.sync.push("policy")


def test_a_skipped_push_is_named_before_the_update() -> None:
    pair = Pair()
    ref = pair.sync.push("policy")
    pair.sync.verify(ref)
    pair.trainer.train()
    with pytest.raises(DeliveryError, match=f"policy@1: .* differs .*{PATHS[0]}"):
        pair.sync.verify(ref)


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flips one bit of one bf16 value in place."""
    tensor.view(torch.int16).view(-1)[element] ^= -(1 << 15) if bit == 15 else 1 << bit


@pytest.mark.parametrize("bit", [0, 7, 15])
@pytest.mark.parametrize("path", [PATHS[0], V1, "model.layers.2.mlp.down_proj"])
def test_one_flipped_bit_is_found_in_any_module(path: str, bit: int) -> None:
    pair = Pair()
    ref = pair.sync.push("policy")
    flip(pair.engine.a[path][0], 5, bit)
    with pytest.raises(DeliveryError, match=f"the engine's slot differs from the trainer's shard in {path}$"):
        pair.sync.verify(ref)
    flip(pair.engine.a[path][0], 5, bit)
    pair.sync.verify(ref)


def test_minus_zero_is_not_zero() -> None:
    """Bit for bit, not by value: the comparison would else miss NaNs and signs."""
    pair = Pair()
    pair.trainer.factors[V1].b.zero_()
    ref = pair.sync.push("policy")
    pair.engine.b[V1][0, 0, 0] = -0.0
    with pytest.raises(DeliveryError, match=V1):
        pair.sync.verify(ref)


def test_nan_equals_the_same_nan() -> None:
    pair = Pair()
    pair.trainer.factors[V1].b[0, 0] = float("nan")
    pair.sync.verify(pair.sync.push("policy"))
    assert pair.engine.b[V1][0, 0, 0].isnan()


def test_a_slot_that_was_evicted_and_reloaded_with_another_version_is_named() -> None:
    """What a least-recently-used cache does behind the caller's back."""
    pair = Pair()
    ref = pair.sync.push("policy")
    kept = {path: LoraShard(a=s.a.clone(), b=s.b.clone()) for path, s in pair.trainer.factors.items()}
    pair.trainer.train()
    newer = pair.sync.push("policy")
    pair.engine.unload_adapter(newer)
    pair.engine.load_adapter(newer, SPEC, kept)
    with pytest.raises(DeliveryError, match=f"policy@2: .*{PATHS[0]}"):
        pair.sync.verify(newer)
    assert ref.content_hash == content_hash(kept) != newer.content_hash


def test_the_hash_sees_every_bit_every_place_and_every_name() -> None:
    factors = FactorTrainer().factors
    seen = {content_hash(factors)}

    def after(change: Callable[[], Any]) -> None:
        change()
        seen.add(content_hash(factors))

    after(lambda: flip(factors[V1].a, 3, 0))
    after(lambda: flip(factors[Q1].b, 0, 15))
    after(lambda: factors[V1].a.copy_(factors[V1].a.flip(0)))
    after(lambda: factors.update({V1: factors.pop(V1)}))
    assert len(seen) == 5


def test_a_slot_of_another_rank_is_not_the_same_adapter() -> None:
    pair = Pair()
    ref = pair.sync.push("policy")
    pair.engine.ranks[ref] = SPEC.rank + 1
    with pytest.raises(DeliveryError, match=f"{PATHS[0]} has another shape"):
        check_delivery(ref, SPEC, pair.trainer.factors, pair.engine.read_adapter(ref))
