"""Linears without adapters whose rows do not depend on the batch, for ``numerics=exact``. Holds for vllm 0.26.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from framework.kernels.product import product


def install(*, exact: bool) -> None:
    """Makes linears of the engine that starts next in this process multiply so, or as vLLM does."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "tandem_product"):
        direct_register_custom_op("tandem_product", product, fake_impl=_shape_only)
    apply = vars(UnquantizedLinearMethod)["apply"]
    original = getattr(apply, "replaces", apply)
    UnquantizedLinearMethod.apply = _multiplying(original) if exact else original


def _shape_only(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _multiplying(original: Any) -> Callable[..., Tensor]:
    def apply(method: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.vllm.tandem_product(x, layer.weight, bias)

    apply.replaces = original  # type: ignore[attr-defined]
    return apply
