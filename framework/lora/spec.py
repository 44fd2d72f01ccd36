"""LoraSpec: the shape of an adapter, the same facts as ``peft.LoraConfig`` without importing it."""

from __future__ import annotations

from dataclasses import dataclass

from framework.errors import AdapterError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every projection that can carry an adapter, in the order of the layout table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """delta W = scale * B A, with A ``[rank, in]`` and B ``[out, rank]`` (Hu et al. 2021, eq. 3)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    """Projections with an adapter, any subset of :data:`TARGETS`; kept in that order."""
    dropout: float = 0.0
    """Probability of zeroing an entry of the adapter's input while training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"lora.rank={self.rank}: must be at least 1")
        if not 0.0 < self.alpha < float("inf"):
            raise AdapterError(f"lora.alpha={self.alpha}: must be positive, or the adapter does nothing")
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"lora.dropout={self.dropout}: must be in [0, 1)")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise AdapterError(f"lora.targets={list(self.targets)}: must be a non-empty subset of {list(TARGETS)}")
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in self.targets))

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
