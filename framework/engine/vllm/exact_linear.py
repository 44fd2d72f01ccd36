"""Products whose rows do not depend on the batch, for ``numerics=exact``: of linears without adapters and of the output
layer. Holds for vllm 0.26.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from framework.kernels.product import product


def install(*, exact: bool) -> None:
    """Makes engines of this process, running ones too, multiply so, or as vLLM does."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "tandem_product"):
        direct_register_custom_op("tandem_product", linear, fake_impl=_shape_only)
    for kind, name, ours in ((UnquantizedLinearMethod, "apply", _apply), (LogitsProcessor, "_apply_head", _apply_head)):
        method = vars(kind)[name]
        original = getattr(method, "replaces", method)
        setattr(kind, name, _instead_of(original, ours) if exact else original)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator that vLLM's graphs call."""
    return product(x, weight, bias)


def _shape_only(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _instead_of(original: Any, ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def method(*args: Any, **named: Any) -> Tensor:
        return ours(*args, **named)

    method.replaces = original  # type: ignore[attr-defined]
    return method


def _apply(method: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.vllm.tandem_product(x, layer.weight, bias)


def _apply_head(processor: Any, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
    assert embedding_bias is None, "no model here has a bias on its output layer"
    return product(hidden_states, lm_head.weight, out_dtype=processor.head_dtype)
