"""Full fine-tuning's way to the engine: the weights are its own, so a push is a version number and its proof.

The optimizer wrote into the tensors that the engine samples with. What is left to do is to say so: cached prefixes are
of the old weights, and samples must carry the version they came from. What is proved is that both sides still hold the
same memory, and, before an update, that nothing has changed since the samples were drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from framework.engine.base import SharedWeightsEngine
from framework.errors import DeliveryError
from framework.trainer.base import Trainer
from framework.types import AdapterRef
from framework.weight_sync import VersionCounter


class SharedWeights:
    """Stands where :class:`WeightSync` stands, for a trainer whose base model is trained in the engine's tensors."""

    def __init__(
        self,
        trainer: Trainer,
        engine: SharedWeightsEngine,
        versions: VersionCounter,
        *,
        synchronize: Callable[[], None],
        check_lockstep: Callable[[str, object], None],
    ) -> None:
        """Wires both sides together; the arguments are :class:`WeightSync`'s."""
        self._trainer = trainer
        self._engine = engine
        self.versions = versions
        self._synchronize = synchronize
        self._check_lockstep = check_lockstep

    def push(self, name: str) -> AdapterRef:
        """Makes the present weights a new version; the engine serves no earlier one. Nothing may be in flight.

        Raises:
            DeliveryError: a tensor of the trainer is not the engine's; the message names it.
        """
        self._check_lockstep("push", (name, self.versions.last + 1))
        weights = self._trainer.base_weights()
        check_shared(weights, self._engine.base_weights())
        self._synchronize()
        ref = AdapterRef(name=name, version=self.versions.next(), content_hash=fingerprint(weights))
        self._engine.adopt_weights(ref)
        return ref

    def verify(self, ref: AdapterRef) -> None:
        """Proves that the weights are those that were pushed as ``ref``.

        Raises:
            DeliveryError: the trainer went on without a push, or something else has written into the weights.
        """
        if fingerprint(self._trainer.base_weights()) != ref.content_hash:
            raise DeliveryError(f"{ref}: the weights have changed since they were pushed; samples are of other weights")


def check_shared(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compares addresses.

    Raises:
        DeliveryError: naming the first tensor that the other side lacks or holds elsewhere.
    """
    for name, tensor in mine.items():
        if name not in theirs or theirs[name].data_ptr() != tensor.data_ptr():
            raise DeliveryError(f"{name}: the trainer's tensor is not the engine's, which samples from other weights")


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Digest of every tensor's name and norm (L2, float32), in one pass over this rank's weights.

    A step of the optimizer changes it, as far as it changes weights at all; equal norms of other values are possible.
    """
    with torch.no_grad():
        norms = torch.stack(torch._foreach_norm(list(weights.values()), 2, torch.float32))
    return hashlib.blake2b(f"{list(weights)}{norms.tolist()}".encode(), digest_size=8).hexdigest()
