"""vLLM's scheduler and front end without a model, to compare steps with and without what replaces parts of them."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framework.engine.vllm.decode_records import recorded_in_place
from framework.engine.vllm.decode_schedule import one_pass
from tests.fakes import tiny_checkpoint

BLOCK = 16


def engine_config(folder: Path) -> Any:
    """Of a tiny model and six requests at once."""
    from vllm import EngineArgs

    model = tiny_checkpoint(folder, family="llama")
    return EngineArgs(
        model=str(model), max_model_len=128, max_num_seqs=6, max_num_batched_tokens=256, block_size=BLOCK
    ).create_engine_config()


class Side:
    """vLLM's scheduler and front end, with a model that says what it is told, two steps in flight or one."""

    def __init__(self, config: Any, *, blocks: int, in_flight: int, fast: bool) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        cache = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        config.cache_config.num_gpu_blocks = blocks
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler: Any = (AsyncScheduler if in_flight == 2 else Scheduler)(
            vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK, hash_block_size=BLOCK,
        )  # fmt: skip
        self.scheduler.use_v2_model_runner = True
        self.front: Any = OutputProcessor(None, log_stats=False)
        self.in_flight, self.flying = in_flight, deque[Any]()
        self.others: list[int] = []
        original = self.scheduler.update_from_output

        def counted(scheduled: Any, output: Any) -> Any:
            self.others.append(len(scheduled.num_scheduled_tokens))
            return original(scheduled, output)

        self.scheduler.update_from_output = counted
        if fast:
            if in_flight == 2:
                one_pass(self.scheduler)
            states = self.front.request_states
            self.scheduler.update_from_output = recorded_in_place(self.scheduler, states, asynchronous=in_flight == 2)

    def add(self, name: str, prompt: list[int], **wanted: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.request import Request

        kind = RequestOutputKind.DELTA if wanted.pop("stream", False) else RequestOutputKind.FINAL_ONLY
        defaults = {"logprobs": 0, "flat_logprobs": True, "detokenize": False, "output_kind": kind}
        params = SamplingParams(**{**defaults, **wanted})
        message = EngineCoreRequest(
            request_id=name, prompt_token_ids=prompt, mm_features=None, sampling_params=params, pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
            external_req_id=name,
        )  # fmt: skip
        self.front.add_request(message, None)
        self.scheduler.add_request(Request.from_engine_core_request(message, self.hasher))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.front.abort_requests([name], internal=True)
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self) -> tuple[Any, Any, Any]:
        """What was scheduled, what came out, and the state after it."""
        scheduled = self.scheduler.schedule()
        seen = facts(scheduled)
        self.flying.append((scheduled, self._model(scheduled)))
        results: Any = None
        if len(self.flying) == self.in_flight or not scheduled.total_num_scheduled_tokens:
            out = self.scheduler.update_from_output(*self.flying.popleft()).get(0)
            results = self.front.process_outputs(out.outputs if out else [])
            results = [repr(r) for r in results.request_outputs]
        return seen, results, self.state()

    def _model(self, scheduled: Any) -> Any:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        names = list(scheduled.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        columns = 1 + max((r.sampling_params.logprobs or 0 for r in requests), default=0)
        tokens = [
            [] if r.is_prefill_chunk else [(7 * r.num_computed_tokens + len(r.request_id)) % 50] for r in requests
        ]
        ids = np.array([[(t or [0])[0] + c for c in range(columns)] for t in tokens], dtype=np.int32)
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: row for row, name in enumerate(names)}, sampled_token_ids=tokens,
            logprobs=LogprobsLists(ids, -ids.astype(np.float32) / 7, np.arange(len(names), dtype=np.int64))
            if names
            else None,
            prompt_logprobs_dict={}, num_nans_in_logits=None if self.in_flight == 2 else {}, pooler_output=[],
        )  # fmt: skip

    def state(self) -> Any:
        (group,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        told = ("num_computed_tokens", "num_output_placeholders", "num_in_flight_tokens", "status", "is_prefill_chunk",
                "_all_token_ids", "_output_token_ids", "block_hashes", "spec_token_ids",
                "next_decode_eligible_step", "num_preemptions")  # fmt: skip
        requests = {n: [repr(getattr(r, name)) for name in told] for n, r in self.scheduler.requests.items()}
        front = {n: [s.detokenizer.token_ids, repr(s.logprobs_processor)] for n, s in self.front.request_states.items()}
        running = [r.request_id for r in self.scheduler.running]
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return running, requests, front, free, dict(group.num_cached_block), self.scheduler.current_step


def facts(scheduled: Any) -> dict[str, str]:
    """All that is scheduled; how long the common prefix is, only another runner asks."""
    return {name: repr(value) for name, value in vars(scheduled).items() if name != "num_common_prefix_blocks"}


def arrivals(side: Side, number: int) -> None:
    """More requests than run at once, of every kind, some of which share a prefix."""
    if number % 3 == 0 and number < 60:
        prompt = [3, 1, 4] * (2 + number % 7) + [number]
        kinds: list[dict[str, Any]] = [
            {"max_tokens": 40},
            {"max_tokens": 5 + number % 30},
            {"max_tokens": 60, "stop_token_ids": [1, 2, 3]},
            {"max_tokens": 500},
            {"max_tokens": 30, "stream": True},
            {"max_tokens": 20, "logprobs": 2},
            {"max_tokens": 20, "min_tokens": 9, "stop_token_ids": list(range(25))},
            {"max_tokens": 25, "flat_logprobs": False},
        ]
        side.add(f"{'r' * (1 + number % 5)}{number}", prompt, **kinds[(number // 3) % len(kinds)])
    if number == 31:
        side.abort(side.scheduler.running[0].request_id)
