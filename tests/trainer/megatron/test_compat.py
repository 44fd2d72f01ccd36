"""What the trainer takes for granted in the installed megatron-core."""

from __future__ import annotations

import importlib.metadata
import inspect

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from framework.trainer.megatron import compat


def test_the_installed_version_is_one_that_compat_holds_for() -> None:
    assert importlib.metadata.version("megatron-core") in compat.HOLDS_FOR


def test_the_model_is_built_with_these_arguments() -> None:
    wanted = {"config", "transformer_layer_spec", "vocab_size", "share_embeddings_and_output_weights"}
    assert wanted <= set(inspect.signature(GPTModel.__init__).parameters)
    assert {"layer_specs", "layer_norm"} <= set(inspect.signature(TransformerBlockSubmodules).parameters)


def test_the_parallel_mappings_take_the_group() -> None:
    for name in (
        "copy_to_tensor_model_parallel_region",
        "reduce_from_tensor_model_parallel_region",
        "gather_from_sequence_parallel_region",
        "reduce_scatter_to_sequence_parallel_region",
    ):
        assert "group" in inspect.signature(getattr(mappings, name)).parameters, name


def test_groups_and_the_random_tracker_start_as_compat_starts_them() -> None:
    started = inspect.signature(parallel_state.initialize_model_parallel).parameters
    assert {"tensor_model_parallel_size", "create_gloo_process_groups"} <= set(started)
    assert "inference_rng_tracker" in inspect.signature(random.initialize_rng_tracker).parameters
