"""The device of a rank: what carries values, and what is refused."""

from __future__ import annotations

import pytest
import torch

from framework.device import DTYPES, open_device
from framework.errors import ConfigError


def test_cpu_carries_values_that_work() -> None:
    device = open_device("cpu", local_rank=3)
    assert (device.kind, device.collective_backend, device.torch_device.type) == ("cpu", "gloo", "cpu")
    assert device.synchronize() is None  # type: ignore[func-returns-value]
    assert device.memory_allocated() == device.peak_memory_allocated() == 0
    assert not device.varlen_attention
    assert not device.shares_weights


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware.device='tpu': must be 'auto', 'cpu' or 'cuda'"):
        open_device("tpu", local_rank=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_an_accelerator_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hardware.device=cuda, but torch finds no CUDA device"):
        open_device("cuda", local_rank=0)
    assert open_device("auto", local_rank=0).kind == "cpu"


def test_dtypes_by_their_names() -> None:
    assert {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()} == {n: n for n in DTYPES}
