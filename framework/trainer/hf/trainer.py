"""HfTrainer: the Trainer Protocol over transformers and PEFT, in one process. The reference the tests compare with.

It is written to be obviously right, not fast: sequences are padded, nothing is fused or sharded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from framework.algorithms.base import LossFn, LossInputs, Metric
from framework.batching import Batch, Microbatch
from framework.device import HOST, Device
from framework.errors import AdapterError, ConfigError, ModelError
from framework.lora.spec import LoraSpec
from framework.metrics import merge_metrics
from framework.models.layout import projections
from framework.models.spec import read_spec
from framework.trainer.base import ForwardBackwardResult, ForwardResult, LoraShard, OptimResult
from framework.trainer.hf.adapter import HfAdapter
from framework.trainer.hf.logprobs import logprobs_and_entropy, pad
from framework.types import AdamParams

ADAPTERS_ONLY = "trainer.backend=hf trains adapters only; lora=none needs trainer.backend=megatron"


class HfTrainer:
    """Trains adapters of one frozen transformers model. The methods are those of the Protocol."""

    def __init__(self, folder: Path, *, device: Device, dtype: torch.dtype) -> None:
        """Loads the model.

        Args:
            folder: a Hugging Face model folder.
            device: where the model and the adapters live.
            dtype: of the model and of the adapters' working copy.

        Raises:
            ModelError: the folder is missing or damaged, or the family is not supported.
        """
        self.spec = read_spec(folder)
        self.dtype = dtype
        self._device = device.torch_device
        self._model = load_model(folder, dtype).to(self._device)
        self._adapters: dict[str, HfAdapter] = {}
        self._peft_names: dict[str, str] = {}
        self._counter = itertools.count()

    @property
    def token_multiple(self) -> int:
        """Microbatches may have any number of tokens."""
        return 1

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> None:
        """See :meth:`Trainer.add_adapter`."""
        if name in self._adapters:
            raise AdapterError(f"the trainer already has an adapter named {name!r}")
        if spec.rank > self.spec.hidden_size:
            raise AdapterError(f"lora.rank={spec.rank} exceeds the model's hidden size {self.spec.hidden_size}")
        peft_name = f"adapter{next(self._counter)}"  # PEFT's names may not contain dots, ours may
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.rank,  # PEFT multiplies by 1; the scale is in the working copy of B
            target_modules=list(spec.targets),
            lora_dropout=spec.dropout,
        )
        self._model.add_adapter(config, peft_name)
        places = []
        for projection in projections(self.spec, spec.targets):
            layer = self._model.get_submodule(projection.path)
            assert isinstance(layer, LoraLayer)
            assert layer.scaling[peft_name] == 1.0
            places.append((projection, layer.lora_A[peft_name].weight, layer.lora_B[peft_name].weight))
        self._model.eval()
        self._adapters[name] = HfAdapter(spec, places, seed=seed)
        self._peft_names[name] = peft_name

    def remove_adapter(self, name: str) -> None:
        """Frees the adapter's weights and state."""
        self._adapter(name)
        self._model.delete_adapter(self._peft_names.pop(name))
        del self._adapters[name]

    def adapters(self) -> Mapping[str, LoraSpec]:
        """The adapters by name."""
        return {name: adapter.spec for name, adapter in self._adapters.items()}

    def train_base(self, name: str) -> None:
        """See :meth:`Trainer.train_base`."""
        raise ConfigError(ADAPTERS_ONLY)

    def base_weights(self) -> Mapping[str, Tensor]:
        """See :meth:`Trainer.base_weights`; transformers' parameters are not in the layout."""
        raise ConfigError(ADAPTERS_ONLY)

    def export_base(self, name: str) -> Mapping[str, Tensor]:
        """See :meth:`Trainer.export_base`."""
        raise ConfigError(ADAPTERS_ONLY)

    def forward(self, name: str | None, batch: Batch) -> ForwardResult:
        """See :meth:`Trainer.forward`."""
        results = []
        with torch.no_grad(), self._switched_to(name, train=False):
            for microbatch in batch.microbatches:
                results.append((microbatch, *self._logprobs(microbatch, batch.temperature)))
        return split_by_datum(results, batch.num_datums)

    def extend(self, name: str | None, past: Any, token_ids: Tensor, *, keep: int) -> tuple[Tensor, Any]:
        """Logits ``[keep, vocab]`` float32 on the host after the last ``keep`` of ``token_ids``, and the new past.

        Args:
            name: adapter, or None for the base model.
            past: keys and values of the tokens before, as returned by the call that read them; None at the start.
            token_ids: ``[n]`` int64, of one sequence.
            keep: 1 to n.
        """
        with torch.no_grad(), self._switched_to(name, train=False):
            output = self._model.base_model(
                input_ids=token_ids[None].to(self._device), past_key_values=past, use_cache=True
            )
            logits = self._model.get_output_embeddings()(output.last_hidden_state[0, -keep:])
        return logits.float().to(HOST), output.past_key_values

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> ForwardBackwardResult:
        """See :meth:`Trainer.forward_backward`.

        Raises:
            ConfigError: the loss function returned another shape than one loss per scored token.
        """
        adapter = self._adapter(name)
        grad = torch.zeros_like(adapter.grad)
        loss, results, metrics = 0.0, [], list[Mapping[str, Metric]]()
        with self._switched_to(name, train=True):
            for microbatch in batch.microbatches:
                logprobs, entropy = self._logprobs(microbatch, batch.temperature)
                inputs = self._loss_inputs(microbatch, logprobs, entropy)
                output = loss_fn(inputs)
                if output.per_token.shape != logprobs.shape:
                    raise ConfigError(
                        f"the loss function returned per_token of shape {list(output.per_token.shape)} for "
                        f"{len(logprobs)} scored tokens; it must give one loss per token"
                    )
                total = (output.per_token * inputs.weights).sum()
                grad += adapter.flatten(torch.autograd.grad(total, adapter.parameters))
                loss += total.item()
                metrics.append(output.metrics)
                results.append((microbatch, logprobs.detach(), entropy.detach()))
        adapter.grad += grad
        result = split_by_datum(results, batch.num_datums)
        return ForwardBackwardResult(loss=loss, metrics=merge_metrics(metrics), result=result)

    def optim_step(self, name: str, params: AdamParams) -> OptimResult:
        """See :meth:`Trainer.optim_step`."""
        return self._adapter(name).optim_step(params)

    def zero_grad(self, name: str) -> None:
        """Forgets the accumulated gradient."""
        self._adapter(name).grad.zero_()

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        """See :meth:`Trainer.adapter_shards`."""
        return self._adapter(name).shards()

    def export_adapter(self, name: str) -> Mapping[str, npt.NDArray[np.float32]]:
        """See :meth:`Trainer.export_adapter`."""
        return {key: tensor.numpy(force=True).copy() for key, tensor in self._adapter(name).named()}

    def import_adapter(self, name: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """See :meth:`Trainer.import_adapter`."""
        whole = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()}
        try:
            self._adapter(name).overwrite(whole)
        except AdapterError as error:
            raise AdapterError(f"adapter {name!r}: {error}") from error

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """See :meth:`Trainer.state_dict`."""
        return self._adapter(name).state_dict()

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainer.load_state_dict`."""
        self._adapter(name).load_state_dict(state)

    def _adapter(self, name: str) -> HfAdapter:
        if name not in self._adapters:
            raise AdapterError(f"the trainer has no adapter named {name!r}; it has {sorted(self._adapters)}")
        return self._adapters[name]

    @contextmanager
    def _switched_to(self, name: str | None, *, train: bool) -> Iterator[None]:
        """Makes one adapter, or none, what the model computes with; ``train`` switches its dropout on, and no other."""
        if name is not None:
            self._adapter(name)
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(name is not None)
                if name is not None:
                    module.set_adapter(self._peft_names[name])
                module.lora_dropout.train(train)
        try:
            yield
        finally:
            self._model.eval()

    def _logprobs(self, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature <= 0.0:
            raise ConfigError(f"batch.temperature={temperature}: must be above 0; logprobs of greedy samples are at 1")
        padded = pad(microbatch, self._device)
        hidden = self._model.base_model(
            input_ids=padded.input_ids,
            position_ids=padded.position_ids,
            attention_mask=padded.attention_mask,
            use_cache=False,
        ).last_hidden_state
        scored = hidden.flatten(0, 1)[padded.scored]
        targets = microbatch.target_ids.to(self._device)
        return logprobs_and_entropy(scored, targets, self._model.get_output_embeddings(), temperature)

    def _loss_inputs(self, microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
        return LossInputs(
            logprobs=logprobs,
            entropy=entropy,
            weights=microbatch.weights.to(self._device),
            sequence_ids=microbatch.sequence_ids.to(self._device),
            num_sequences=microbatch.num_sequences,
            fields={name: values.to(self._device) for name, values in microbatch.fields.items()},
        )


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """A frozen transformers model in eval mode, every parameter read from the folder.

    Raises:
        ModelError: a file is missing or damaged, or a weight is missing or of another shape.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.name_or_path={folder}: transformers cannot load it: {error}") from error
    bad = [*report["missing_keys"], *report["mismatched_keys"]]
    if bad:  # transformers would go on with random values
        raise ModelError(f"model.name_or_path={folder}: weights are missing or of another shape: {sorted(bad)[:6]}")
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False)


def split_by_datum(results: list[tuple[Microbatch, Tensor, Tensor]], num_datums: int) -> ForwardResult:
    """Per-token results of microbatches as one array per datum, in the order of the datums."""
    logprobs, entropy = ([np.empty(0, dtype=np.float32)] * num_datums for _ in range(2))
    for microbatch, *values in results:
        counts = torch.bincount(microbatch.sequence_ids, minlength=microbatch.num_sequences).tolist()
        for column, flat in zip((logprobs, entropy), values, strict=True):
            for datum, part in zip(microbatch.datum_ids, flat.split(counts), strict=True):
                column[datum] = part.numpy(force=True).copy()
    return ForwardResult(logprobs=tuple(logprobs), entropy=tuple(entropy))
