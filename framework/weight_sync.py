"""WeightSync: a trained adapter becomes a new immutable version in the engine, and proves it.

A push is this rank's shards copied into a slot of this rank's engine: no gather, no disk, no collective. What comes
after is the proof: the set of modules in the slot equals the set exported, and every factor read back is bit for bit
the trainer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.engine.base import RolloutEngine
from framework.errors import DeliveryError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard, Trainer
from framework.types import AdapterRef


class VersionCounter:
    """Hands out version numbers: from 1, rising, never one twice. The same on all ranks, because all push alike."""

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def next(self) -> int:
        """A number that was never handed out."""
        self.last += 1
        return self.last


class WeightSync:
    """Pushes adapters from the trainer to the engine. Collective in the sense of lockstep, without collectives."""

    def __init__(
        self,
        trainer: Trainer,
        engine: RolloutEngine,
        versions: VersionCounter,
        *,
        synchronize: Callable[[], None],
        check_lockstep: Callable[[str, object], None],
    ) -> None:
        """Wires both sides together.

        Args:
            synchronize: waits for the device.
            check_lockstep: compares a value over the tensor-parallel group, see :meth:`Mesh.check_lockstep`.
        """
        self._trainer = trainer
        self._engine = engine
        self.versions = versions
        self._synchronize = synchronize
        self._check_lockstep = check_lockstep
        self._current: dict[str, AdapterRef] = {}

    def push(self, name: str) -> AdapterRef:
        """Makes the adapter's present weights a new version in the engine; its previous version is unloaded.

        Raises:
            DeliveryError: the engine does not hold exactly what was pushed; the message names the module.
        """
        previous = self._current.pop(name, None)
        if previous is not None:
            self._engine.unload_adapter(previous)
        ref = self.publish(name)
        self._current[name] = ref
        return ref

    def publish(self, name: str) -> AdapterRef:
        """Like :meth:`push`, but earlier versions stay; the caller unloads them."""
        spec = self._trainer.adapters()[name]
        self._check_lockstep("push", (name, spec, self.versions.last + 1))
        shards = self._trainer.adapter_shards(name)
        ref = AdapterRef(name=name, version=self.versions.next(), content_hash=content_hash(shards))
        self._engine.load_adapter(ref, spec, shards)
        self._synchronize()
        check_delivery(ref, spec, shards, self._engine.read_adapter(ref))
        return ref


def content_hash(shards: Mapping[str, LoraShard]) -> str:
    """Digest of this rank's factors in module order: names, shapes and a sum over bit patterns, made on the device.

    The sum weighs each 16-bit (or 32-bit) pattern by its position, modulo 2**63, so that moved values change it.
    """
    digest = hashlib.blake2b(digest_size=8)
    factors = [factor for shard in shards.values() for factor in (shard.a, shard.b)]
    for path, shard in shards.items():
        digest.update(f"{path}{tuple(shard.a.shape)}{tuple(shard.b.shape)}".encode())
    digest.update(str(int(_pattern_sum(factors))).encode())
    return digest.hexdigest()


def _pattern_sum(factors: list[Tensor]) -> Tensor:
    flat = torch.cat([factor.reshape(-1) for factor in factors])
    patterns = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32).to(torch.int64)
    positions = torch.arange(1, len(patterns) + 1, device=flat.device) * 2654435761
    return (patterns * positions).sum()


def check_delivery(
    ref: AdapterRef, spec: LoraSpec, pushed: Mapping[str, LoraShard], held: Mapping[str, LoraShard]
) -> None:
    """Compares a slot with what was pushed into it, on this rank.

    Args:
        ref: for the message.
        spec: of the adapter.
        pushed: the trainer's shards by module path.
        held: the engine's slot by module path; modules that were not pushed must be zero.

    Raises:
        DeliveryError: naming the first module that is missing, should be zero, or differs.
    """
    wanted = {path for path in held if path.rpartition(".")[2] in spec.targets}
    for problem, paths in (("was not pushed", wanted - set(pushed)), ("has no slot", set(pushed) - set(held))):
        if paths:
            raise DeliveryError(f"{ref}: {sorted(paths)[0]} {problem} ({len(paths)} modules in all)")
    pairs = [(path, getattr(held[path], f), getattr(shard, f)) for path, shard in pushed.items() for f in ("a", "b")]
    extra = [(path, getattr(held[path], f)) for path in set(held) - set(pushed) for f in ("a", "b")]
    verdicts = [torch.equal(mine, theirs) for _, mine, theirs in pairs]
    if not all(verdicts):
        raise DeliveryError(f"{ref}: the engine's slot differs from the trainer's shard in {pairs[verdicts.index(False)][0]}")
    for path, tensor in extra:
        if tensor.any():
            raise DeliveryError(f"{ref}: {path} has no adapter, but its slot is not zero")
