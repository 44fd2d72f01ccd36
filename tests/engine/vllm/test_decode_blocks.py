"""Blocks are allocated and cached at the same steps whether every decode step asks or only those that may need one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from framework.engine.vllm.decode_blocks import inside_blocks

BLOCK = 16


class Side:
    """vLLM's cache manager with one request that is decoded with two steps in flight, as the scheduler does."""

    def __init__(self, prompt: int, *, fast: bool) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self.manager: Any = KVCacheManager(
            config, max_model_len=512, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=True
        )
        self.asked = 0
        original = self.manager.allocate_slots

        def counted(*args: Any, **named: Any) -> Any:
            self.asked += 1
            return original(*args, **named)

        self.manager.allocate_slots = counted
        if fast:
            self.manager.allocate_slots = inside_blocks(self.manager)
        self.request = Request(
            "r", list(range(prompt)), SamplingParams(max_tokens=200), None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )  # fmt: skip
        assert self.manager.allocate_slots(self.request, prompt, num_lookahead_tokens=0) is not None
        self.request.num_computed_tokens = prompt
        self.in_flight = 1

    def step(self, number: int) -> tuple[Any, int, int]:
        """Schedules one token; the one scheduled two steps ago arrives."""
        blocks = self.manager.allocate_slots(self.request, 1, num_lookahead_tokens=0)
        self.request.num_computed_tokens += 1
        self.in_flight += 1
        if self.in_flight > 2:
            self.request.append_output_token_ids(1000 + number)
            self.in_flight -= 1
        (group,) = self.manager.coordinator.single_type_managers
        return blocks.get_block_ids(allow_none=True), len(group.req_to_blocks["r"]), group.num_cached_block.get("r", 0)


@pytest.mark.parametrize("prompt", [1, 2, 3, 14, 15, 16, 17, 31, 40])
def test_every_step_gets_the_same_blocks(prompt: int) -> None:
    plain, fast = Side(prompt, fast=False), Side(prompt, fast=True)
    for number in range(100):
        assert fast.step(number) == plain.step(number)
    assert plain.asked == 101
    assert fast.asked < 40


def test_a_request_without_its_block_is_not_answered_for() -> None:
    side = Side(20, fast=True)
    (group,) = side.manager.coordinator.single_type_managers
    asked = side.asked
    group.req_to_blocks["r"].pop()
    side.step(0)
    assert side.asked == asked + 1
