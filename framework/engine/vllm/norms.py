"""The engine's norms by the trainer's kernel, and its other pointwise functions by kernels that round alike.

vLLM (0.26.0) computes a norm by whichever provider its list of priorities names first, in compiled graphs and without
them. One element in 10^5 that is rounded otherwise is enough for two logprobs to differ as two orders of summation do,
so the trainer's own kernel is registered as a provider and named first, for activations; for norms over heads see
head_norms.py. SwiGLU, and rotation where heads have no norms, are vLLM's own kernels also in compiled graphs, where its
compiler would leave out a rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROVIDER = "tandem"
_LIBRARY = torch.library.Library("tandem", "FRAGMENT")


def arguments() -> dict[str, Any]:
    """Of vLLM's engine; registers the provider, which needs a kernel compiler."""
    from vllm import ir

    from framework.kernels import rms_norm as kernels

    if PROVIDER not in ir.ops.rms_norm.impls:
        _LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
        _LIBRARY.define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
        for name, kernel, shapes in (
            ("rms_norm", kernels.rms_norm, lambda x, weight, eps: torch.empty_like(x)),
            (
                "add_rms_norm",
                kernels.add_rms_norm,
                lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
            ),
        ):
            _LIBRARY.impl(name, kernel, torch.accelerator.current_accelerator().type.upper())  # type: ignore[union-attr]
            _LIBRARY._register_fake(name, shapes)
        _register(ir)
    return {
        "ir_op_priority": {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]},
        "compilation_config": {
            "custom_ops": ["+silu_and_mul", "+rotary_embedding"],
            "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},  # for quantised models
        },
    }


def _register(ir: Any) -> None:
    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_of_rows)
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        return torch.ops.tandem.rms_norm(x, weight, epsilon)

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_sum_of_rows)
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.tandem.add_rms_norm(x, x_residual, weight, epsilon)


def _norm_of_rows(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.dim() == 2


def _sum_of_rows(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _norm_of_rows(x, weight, epsilon, variance_size)
