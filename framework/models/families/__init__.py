"""The supported model families: one file each, one row of this dict each."""

from __future__ import annotations

from framework.models.families import llama, qwen2, qwen3
from framework.models.families.base import Family

FAMILIES: dict[str, Family] = {
    "llama": Family(spec=llama.spec, layer=llama.LAYER_TABLE),
    "qwen2": Family(spec=qwen2.spec, layer=qwen2.LAYER_TABLE),
    "qwen3": Family(spec=qwen3.spec, layer=qwen3.LAYER_TABLE),
}
"""By ``model_type`` in config.json."""
