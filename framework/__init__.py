"""LoRA reinforcement learning with a Megatron-core trainer and a vLLM engine in one process per rank.

Importing this package does nothing heavy: torch, megatron and vllm are imported by the modules that use them.
"""

__version__ = "0.1.0"
