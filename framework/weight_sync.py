"""WeightSync: a trained adapter becomes a new immutable version in the engine, and proves it.

A push is this rank's shards copied into a slot of this rank's engine: no gather, no disk, no collective. What comes
after is the proof: the set of modules in the slot equals the set exported, and every factor read back is bit for bit
the trainer's. The same proof before each update (:meth:`WeightSync.verify`) finds a push that was skipped and a slot
that something else has written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

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

    def verify(self, ref: AdapterRef) -> None:
        """Proves again that the slot of ``ref`` holds, bit for bit, what the trainer holds now.

        Called between sampling and the update it shows that the samples came from the weights that are updated.

        Raises:
            DeliveryError: the trainer went on without a push, or the slot was overwritten; names the module.
        """
        spec = self._trainer.adapters()[ref.name]
        check_delivery(ref, spec, self._trainer.adapter_shards(ref.name), self._engine.read_adapter(ref))

    def release(self, name: str) -> None:
        """Unloads the version that :meth:`push` made last; its number is not used again."""
        self._engine.unload_adapter(self._current.pop(name))


def content_hash(shards: Mapping[str, LoraShard]) -> str:
    """Digest of this rank's factors in module order: names, shapes and a sum over bit patterns, made on the device.

    The sum weighs each word of eight bytes by its place, with odd weights, modulo 2**64: a changed word always changes
    it, moved values change it.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, shard in shards.items():
        digest.update(f"{path}{tuple(shard.a.shape)}{tuple(shard.b.shape)}".encode())
    digest.update(str(int(_pattern_sum(_words(_factors(shards.values()))))).encode())
    return digest.hexdigest()


def _factors(shards: Iterable[LoraShard]) -> list[Tensor]:
    return [factor for shard in shards for factor in (shard.a, shard.b)]


def _words(factors: list[Tensor]) -> Tensor:
    """``[n]`` int64: the factors' bytes end to end, filled up with zeros to whole words; one gather on the device."""
    flat = torch.cat([factor.reshape(-1) for factor in factors])
    spare = -flat.nbytes % 8 // flat.element_size()
    return (torch.cat([flat, flat.new_zeros(spare)]) if spare else flat).view(torch.int64)


def _pattern_sum(words: Tensor) -> Tensor:
    weights = torch.arange(1, 2 * len(words), 2, device=words.device) * 2654435761
    return (words * weights).sum()


def check_delivery(
    ref: AdapterRef, spec: LoraSpec, pushed: Mapping[str, LoraShard], held: Mapping[str, LoraShard]
) -> None:
    """Compares a slot with what was pushed into it, on this rank: bit for bit, in one pass and one wait.

    Args:
        ref: for the message.
        spec: of the adapter.
        pushed: the trainer's shards by module path.
        held: the engine's slot by module path; modules that were not pushed must be zero.

    Raises:
        DeliveryError: naming the first module that is missing, exported twice, should be zero, or differs.
    """
    wanted = {path for path in held if path.rpartition(".")[2] in spec.targets}
    for problem, paths in (("was not pushed", wanted - set(pushed)), ("has no slot", set(pushed) - set(held))):
        if paths:
            raise DeliveryError(f"{ref}: {sorted(paths)[0]} {problem} ({len(paths)} modules in all)")
    owners: dict[int, str] = {}
    for path, shard in pushed.items():
        for factor in (shard.a, shard.b):
            if (owner := owners.setdefault(factor.data_ptr(), path)) != path:
                raise DeliveryError(f"{ref}: the trainer exports the same factor as {owner} and as {path}")
        if held[path].a.shape != shard.a.shape or held[path].b.shape != shard.b.shape:
            raise DeliveryError(f"{ref}: {path} has another shape in the engine's slot than in the trainer")
    stray = [path for path in held if path not in pushed]
    mine, theirs = _words(_factors(pushed.values())), _words(_factors(held[path] for path in pushed))
    wrong = (mine != theirs).any()
    if stray:
        wrong = wrong | _words(_factors(held[path] for path in stray)).any()
    if not wrong:
        return
    for path, shard in pushed.items():
        if not torch.equal(_words(_factors([shard])), _words(_factors([held[path]]))):
            raise DeliveryError(f"{ref}: the engine's slot differs from the trainer's shard in {path}")
    odd = next(path for path in stray if _words(_factors([held[path]])).any())
    raise DeliveryError(f"{ref}: {odd} has no adapter, but its slot is not zero")
