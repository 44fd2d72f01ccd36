"""WeightSync: a trained adapter becomes a new immutable version in the engine, and proves it.

A push is this rank's shards copied into a slot of this rank's engine: no gather, no disk, no collective. What comes
after is the proof: the set of modules in the slot equals the set exported, and every factor read back is bit for bit
the trainer's. The same proof before each update (:meth:`WeightSync.verify`) finds a push that was skipped and a slot
that something else has written to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.device import HOST
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
        self._pushed: dict[str, Factors] = {}
        self._held: dict[int, Factors] = {}
        self._scratch = (Scratch(), Scratch())
        """For the trainer's bytes and for the slot's; a proof does not begin by asking for memory."""

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
        adapters = self._trainer.adapters()
        spec = adapters[name]
        self._check_lockstep("push", (name, spec, self.versions.last + 1))
        shards = self._trainer.adapter_shards(name)
        for gone in [other for other in self._pushed if other not in adapters]:
            del self._pushed[gone]  # its views would keep a removed adapter's memory
        pushed = self._pushed[name] = _remembered(self._pushed.get(name), shards)
        mine, theirs = self._scratch
        words = pushed.gather(mine)
        ref = AdapterRef(name=name, version=self.versions.next(), content_hash=_digest(pushed, words, theirs))
        self._engine.load_adapter(ref, spec, shards)
        self._synchronize()
        _compare(ref, spec, pushed, words, self._slot(ref), theirs)
        return ref

    def verify(self, ref: AdapterRef) -> None:
        """Proves again that the slot of ``ref`` holds, bit for bit, what the trainer holds now.

        Called between sampling and the update it shows that the samples came from the weights that are updated.

        Raises:
            DeliveryError: the trainer went on without a push, or the slot was overwritten; names the module.
        """
        pushed = _remembered(self._pushed.get(ref.name), self._trainer.adapter_shards(ref.name))
        mine, theirs = self._scratch
        _compare(ref, self._trainer.adapters()[ref.name], pushed, pushed.gather(mine), self._slot(ref), theirs)

    def release(self, name: str) -> None:
        """Unloads the version that :meth:`push` made last; its number is not used again."""
        self._engine.unload_adapter(self._current.pop(name))

    def _slot(self, ref: AdapterRef) -> Factors:
        shards = self._engine.read_adapter(ref)
        if len(self._held) > MAX_HELD:
            self._held.clear()
        held = self._held[id(shards)] = _remembered(self._held.get(id(shards)), shards)
        return held


def _remembered(known: Factors | None, shards: Mapping[str, LoraShard]) -> Factors:
    """Trainer and engine hand out the same views at every push; flattening them takes longer than the push."""
    return known if known is not None and known.shards is shards else Factors(shards)


MAX_HELD = 256
"""Slots, by rank, whose views are remembered."""

_COLUMNS = 4096
"""Words of eight bytes in a row of the digest's sum; what is gathered is filled up to whole rows."""


class Scratch:
    """Memory that is used again and again, as large as was ever asked for; an accelerator's is torch's to keep."""

    def __init__(self) -> None:
        self._memory = torch.zeros(0, dtype=torch.int64)

    def rows(self, count: int, device: torch.device) -> Tensor:
        """``[count, 4096]`` int64 of any values."""
        if device != HOST:
            return torch.empty(count, _COLUMNS, dtype=torch.int64, device=device)
        if self._memory.numel() < count * _COLUMNS or self._memory.device != device:
            self._memory = torch.zeros(count * _COLUMNS, dtype=torch.int64, device=device)
        return self._memory[: count * _COLUMNS].view(count, _COLUMNS)


class Factors:
    """One mapping's factors as flat vectors, so that all of them are gathered in one pass over the device."""

    def __init__(self, shards: Mapping[str, LoraShard]) -> None:
        self.shards = shards
        self._parts = [factor.reshape(-1) for shard in shards.values() for factor in (shard.a, shard.b)]
        self._views = [factor for shard in shards.values() for factor in (shard.a, shard.b)]
        self._aliased = all(
            part.data_ptr() == view.data_ptr() for part, view in zip(self._parts, self._views, strict=True)
        )
        self.shape = "".join(f"{path}{tuple(s.a.shape)}{tuple(s.b.shape)}" for path, s in shards.items())
        owners: dict[int, str] = {}
        self.repeated: tuple[str, str] | None = None
        """Two modules whose factors are the same memory."""
        for path, shard in shards.items():
            for factor in (shard.a, shard.b):
                if (owner := owners.setdefault(factor.data_ptr(), path)) != path and factor.numel():
                    self.repeated = (owner, path)
        if self._parts:
            size = sum(part.nbytes for part in self._parts)
            spare = -size % (8 * _COLUMNS) // self._parts[0].element_size()
            self._spare = [self._parts[0].new_zeros(spare)]
            self._rows = -(-size // (8 * _COLUMNS))

    def gather(self, scratch: Scratch) -> Tensor:
        """``[rows, 4096]`` int64 in ``scratch``: the factors' bytes as they are now, end to end, zeros after them."""
        if not self._parts:
            return torch.zeros(0, _COLUMNS, dtype=torch.int64)
        parts = self._parts if self._aliased else [view.reshape(-1) for view in self._views]
        words = scratch.rows(self._rows, parts[0].device)
        torch.cat(parts + self._spare, out=words.view(-1).view(parts[0].dtype))
        return words


def content_hash(shards: Mapping[str, LoraShard]) -> str:
    """Digest of this rank's factors in module order: names, shapes and a sum over bit patterns, made on the device.

    The sum weighs each word of eight bytes by its place, with odd weights, modulo 2**64: a changed word always changes
    it, moved values change it.
    """
    factors = Factors(shards)
    return _digest(factors, factors.gather(Scratch()), Scratch())


def _digest(factors: Factors, words: Tensor, scratch: Scratch) -> str:
    columns, rows = (_odd_weights(n, words.device) for n in (words.shape[1], words.shape[0]))
    weighed = torch.mul(words, columns, out=scratch.rows(len(words), words.device))
    total = (weighed.sum(dim=1) * rows).sum()
    return hashlib.blake2b(f"{factors.shape}{int(total)}".encode(), digest_size=8).hexdigest()


def _odd_weights(count: int, device: torch.device) -> Tensor:
    return (torch.arange(1, count + 1, device=device) * -7046029254386353131) | 1  # 2**64 / golden ratio, as int64


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
    mine = Factors(pushed)
    _compare(ref, spec, mine, mine.gather(Scratch()), Factors(held), Scratch())


def _compare(ref: AdapterRef, spec: LoraSpec, pushed: Factors, words: Tensor, held: Factors, scratch: Scratch) -> None:
    if pushed.repeated is not None:
        first, second = pushed.repeated
        raise DeliveryError(f"{ref}: the trainer exports the same factor as {first} and as {second}")
    if pushed.shape == held.shape:  # the same modules in the same order: every push of a full adapter
        if not torch.equal(words, held.gather(scratch)):
            _explain(ref, pushed.shards, held.shards)
        return
    _check_modules(ref, spec, pushed.shards, held.shards)
    stray = Factors({path: shard for path, shard in held.shards.items() if path not in pushed.shards})
    theirs = Factors({path: held.shards[path] for path in pushed.shards})
    if not torch.equal(words, theirs.gather(scratch)) or bool(stray.gather(scratch).any()):
        _explain(ref, pushed.shards, held.shards)


def _check_modules(
    ref: AdapterRef, spec: LoraSpec, pushed: Mapping[str, LoraShard], held: Mapping[str, LoraShard]
) -> None:
    wanted = {path for path in held if path.rpartition(".")[2] in spec.targets}
    for problem, paths in (("was not pushed", wanted - set(pushed)), ("has no slot", set(pushed) - set(held))):
        if paths:
            raise DeliveryError(f"{ref}: {sorted(paths)[0]} {problem} ({len(paths)} modules in all)")
    for path, shard in pushed.items():
        if held[path].a.shape != shard.a.shape or held[path].b.shape != shard.b.shape:
            raise DeliveryError(f"{ref}: {path} has another shape in the engine's slot than in the trainer")


def _explain(ref: AdapterRef, pushed: Mapping[str, LoraShard], held: Mapping[str, LoraShard]) -> None:
    for path, shard in pushed.items():
        if not torch.equal(_bits({path: shard}), _bits({path: held[path]})):
            raise DeliveryError(f"{ref}: the engine's slot differs from the trainer's shard in {path}")
    odd = next(path for path, shard in held.items() if path not in pushed and _bits({path: shard}).any())
    raise DeliveryError(f"{ref}: {odd} has no adapter, but its slot is not zero")


def _bits(shards: Mapping[str, LoraShard]) -> Tensor:
    """Compared as words, for zero and minus zero are equal as numbers."""
    return Factors(shards).gather(Scratch())
