"""The layout table: order and split of a rank's parameters, and where each projection's adapter lives."""

from __future__ import annotations

from pathlib import Path

from framework.lora.spec import TARGETS
from framework.models.layout import Projection, Split, entries, projections
from framework.models.spec import read_spec


def test_entries_of_a_qwen2_layer(tiny: dict[str, Path]) -> None:
    table = {entry.name: entry for entry in entries(read_spec(tiny["qwen2"]))}
    assert next(iter(table)) == "model.embed_tokens.weight"
    assert list(table)[-1] == "model.norm.weight"  # tied: no lm_head
    qkv = table["model.layers.1.self_attn.qkv_proj.weight"]
    assert qkv.sources == tuple(f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv")
    assert qkv.split is Split.ROWS
    assert table["model.layers.1.self_attn.qkv_proj.bias"].split is Split.ROWS
    assert table["model.layers.0.mlp.gate_up_proj.weight"].sources == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert table["model.layers.0.mlp.down_proj.weight"].split is Split.COLUMNS
    assert table["model.embed_tokens.weight"].split is Split.VOCAB


def test_untied_models_have_an_output_layer(tiny: dict[str, Path]) -> None:
    last = list(entries(read_spec(tiny["llama"])))[-1]
    assert (last.name, last.split) == ("lm_head.weight", Split.VOCAB)


def test_projections_keep_module_order_whatever_the_order_asked_for(tiny: dict[str, Path]) -> None:
    spec = read_spec(tiny["qwen3"])
    assert [p.target for p in projections(spec, TARGETS)][:7] == list(TARGETS)
    found = list(projections(spec, ("up_proj", "v_proj", "q_proj")))
    assert [p.path for p in found] == [
        f"model.layers.{i}.{leaf}" for i in range(2) for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]


def test_a_projection_knows_its_place(tiny: dict[str, Path]) -> None:
    """Qwen3 here: hidden 64, 4 heads and 2 key/value heads of 32."""
    v, down, *_ = projections(read_spec(tiny["qwen3"]), ("v_proj", "down_proj"))
    assert v == Projection(
        path="model.layers.0.self_attn.v_proj",
        target="v_proj",
        parent="model.layers.0.self_attn.qkv_proj",
        slice_index=2,
        column_parallel=True,
        out_features=64,
        in_features=64,
        sibling_rows=(128, 64, 64),
    )
    assert (down.out_features, down.in_features, down.column_parallel, down.sibling_rows) == (64, 96, False, (64,))
