"""What Megatron-core needs before it runs here. Holds for :data:`HOLDS_FOR`.

Megatron asks ``torch.cuda.current_device()`` wherever it allocates, and forks a CUDA random-number tracker around the
decoder when sequence parallelism is on. Without a GPU the first must answer the CPU and the second do nothing; both
can go when Megatron takes its device from the configuration.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel

from framework.device import Device
from framework.distributed import Mesh

HOLDS_FOR = ("0.16.1", "0.19.2")
"""Versions of megatron-core: the newest for Python 3.11 (CPU), and the GPU's."""


def initialize(device: Device, mesh: Mesh) -> None:
    """Makes Megatron's process groups and random-number tracker. All ranks must call it; a second call does nothing."""
    if parallel_state.model_parallel_is_initialized():
        assert parallel_state.get_tensor_model_parallel_world_size() == mesh.tp_size, "one mesh per process"
        return
    if device.kind == "cpu":
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=mesh.tp_size, create_gloo_process_groups=False)
    # This tracker's fork() does nothing: no module of ours draws from Megatron's random states.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
