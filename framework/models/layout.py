"""The layout table: which HF tensors make up each of a rank's parameters, and how they are split.

A parameter has the name, shape and row order that vLLM gives it, so that sharing it is aliasing and export is a
rename. ``{i}`` stands for the layer's number.

    ROWS        each HF tensor is cut into T row blocks; a rank stacks its block of each: [q_t; k_t; v_t]
    COLUMNS     the one HF tensor is cut into T column blocks
    REPLICATED  every rank has the whole tensor
    VOCAB       rows padded with zeros to a multiple of 64, then cut into T row blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from framework.models.spec import ModelSpec

LAYER = "model.layers.{i}."


class Split(Enum):
    """How a parameter is divided over the tensor-parallel ranks."""

    ROWS = "rows"
    COLUMNS = "columns"
    REPLICATED = "replicated"
    VOCAB = "vocab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter of a rank."""

    name: str
    """Ours and vLLM's."""
    sources: tuple[str, ...]
    """HF names, in row order."""
    split: Split


def _entry(name: str, *sources: str, split: Split) -> Entry:
    return Entry(name=name, sources=sources or (name,), split=split)


ATTENTION = (
    _entry(
        LAYER + "self_attn.qkv_proj.weight",
        *(LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"),
        split=Split.ROWS,
    ),
    _entry(LAYER + "self_attn.o_proj.weight", split=Split.COLUMNS),
)
QKV_BIAS = (
    _entry(LAYER + "self_attn.qkv_proj.bias", *(LAYER + f"self_attn.{p}_proj.bias" for p in "qkv"), split=Split.ROWS),
)
QK_NORM = (
    _entry(LAYER + "self_attn.q_norm.weight", split=Split.REPLICATED),
    _entry(LAYER + "self_attn.k_norm.weight", split=Split.REPLICATED),
)
MLP = (
    _entry(
        LAYER + "mlp.gate_up_proj.weight",
        LAYER + "mlp.gate_proj.weight",
        LAYER + "mlp.up_proj.weight",
        split=Split.ROWS,
    ),
    _entry(LAYER + "mlp.down_proj.weight", split=Split.COLUMNS),
)
NORMS = (
    _entry(LAYER + "input_layernorm.weight", split=Split.REPLICATED),
    _entry(LAYER + "post_attention_layernorm.weight", split=Split.REPLICATED),
)
EMBEDDING = _entry("model.embed_tokens.weight", split=Split.VOCAB)
FINAL_NORM = _entry("model.norm.weight", split=Split.REPLICATED)
LM_HEAD = _entry("lm_head.weight", split=Split.VOCAB)

DENSE_LAYER = ATTENTION + MLP + NORMS


def entries(spec: ModelSpec) -> Iterator[Entry]:
    """Every parameter of the model, in the order of the forward pass, with ``{i}`` filled in."""
    from framework.models.families import FAMILIES  # the families' tables are made of this module's pieces

    yield EMBEDDING
    for index in range(spec.num_layers):
        for entry in FAMILIES[spec.family].layer:
            yield Entry(
                name=entry.name.format(i=index),
                sources=tuple(source.format(i=index) for source in entry.sources),
                split=entry.split,
            )
    yield FINAL_NORM
    if not spec.tied_embeddings:
        yield LM_HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Where one HF projection lives inside a rank's parameter, and how its adapter is sharded."""

    path: str
    """HF module path, e.g. ``model.layers.0.self_attn.q_proj``: the key of an adapter's factors everywhere."""
    target: str
    """``q_proj`` and so on."""
    parent: str
    """The fused module, e.g. ``model.layers.0.self_attn.qkv_proj``."""
    slice_index: int
    """Its place in the fused module (q 0, k 1, v 2; gate 0, up 1; otherwise 0)."""
    column_parallel: bool
    """True: A replicated, B split by rows. False: A split by columns, B replicated."""
    out_features: int
    """Whole, not local."""
    in_features: int
    """Whole, not local."""
    sibling_rows: tuple[int, ...]
    """Whole rows of every projection of the fused module, in order."""


_FUSED = (
    ("self_attn.qkv_proj", "self_attn", ("q_proj", "k_proj", "v_proj"), True),
    ("self_attn.o_proj", "self_attn", ("o_proj",), False),
    ("mlp.gate_up_proj", "mlp", ("gate_proj", "up_proj"), True),
    ("mlp.down_proj", "mlp", ("down_proj",), False),
)


def projections(spec: ModelSpec, targets: tuple[str, ...]) -> Iterator[Projection]:
    """The projections with an adapter, in module order."""
    for index in range(spec.num_layers):
        layer = LAYER.format(i=index)
        for parent, block, members, column_parallel in _FUSED:
            for slice_index, target in enumerate(members):
                if target in targets:
                    out_features, in_features = spec.projection_shape(target)
                    yield Projection(
                        path=f"{layer}{block}.{target}",
                        target=target,
                        parent=layer + parent,
                        slice_index=slice_index,
                        column_parallel=column_parallel,
                        out_features=out_features,
                        in_features=in_features,
                        sibling_rows=tuple(spec.projection_shape(member)[0] for member in members),
                    )
