"""MegatronTrainer: the Trainer Protocol over one frozen GPTModel and any number of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from framework.algorithms.base import LossFn, LossInputs, Metric
from framework.batching import Batch, Microbatch
from framework.device import HOST, Device
from framework.distributed import Mesh
from framework.errors import AdapterError, ConfigError, DataError
from framework.lora.spec import LoraSpec
from framework.models.layout import EMBEDDING, LM_HEAD
from framework.models.spec import ModelSpec
from framework.trainer.base import ForwardBackwardResult, ForwardResult, LoraShard, OptimResult
from framework.trainer.megatron import compat, cudnn_backward
from framework.trainer.megatron.adapter import AdapterState
from framework.trainer.megatron.attention import backward_kernel, by_cudnn, inverse_frequencies, plan
from framework.trainer.megatron.base_state import BaseState
from framework.trainer.megatron.layers import LayerContext
from framework.trainer.megatron.logprobs import VocabShard, logprobs_and_entropy
from framework.trainer.megatron.lora_linear import LoraSwitch
from framework.trainer.megatron.model import bind_weights, build_model
from framework.trainer.megatron.pointwise import PLAIN, Pointwise
from framework.types import AdamParams

RECOMPUTE = ("none", "mlp", "all_but_attention", "full")


class MegatronTrainer:
    """Tensor-, sequence- and data-parallel LoRA training. All methods are collective, see the Protocol."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        *,
        mesh: Mesh,
        device: Device,
        dtype: torch.dtype,
        sequence_parallel: bool,
        recompute: str,
        attention: Any = None,
        exact: bool = False,
    ) -> None:
        """Builds the model around ``weights``, which are neither copied nor changed.

        Args:
            spec: of the model.
            weights: this rank's shard by the layout's names, in ``dtype`` on the device.
            mesh: of this rank.
            device: of this rank.
            dtype: compute dtype.
            sequence_parallel: split norms and residuals over the sequence; has an effect with two ranks or more.
            recompute: one of :data:`RECOMPUTE`.
            attention: the engine's kernel, see :attr:`PackedPlan.kernel`; None for the trainer's own.
            exact: a token's forward pass has the same bits whatever it is computed with, those of an exact engine's.
        """
        if recompute not in RECOMPUTE:
            raise ConfigError(f"trainer.recompute={recompute!r}: must be one of {list(RECOMPUTE)}")
        spec.check_tensor_parallel(mesh.tp_size)
        compat.initialize(device, mesh)
        self.spec, self.mesh, self.device, self.dtype = spec, mesh, device, dtype
        self.sequence_parallel = sequence_parallel and mesh.tp_size > 1
        self._switch = LoraSwitch()
        context = LayerContext(
            spec=spec,
            mesh=mesh,
            switch=self._switch,
            sequence_parallel=self.sequence_parallel,
            recompute=recompute,
            pointwise=_pointwise(device, exact=exact),
        )
        self._model = build_model(context, dtype)
        self._weights = bind_weights(self._model, weights)
        self._head = self._weights.get(LM_HEAD.name, self._weights[EMBEDDING.name])
        self._vocab = _vocab_shard(spec, mesh, self._head, context.pointwise)
        self._attention = attention
        self._attention_backward = backward_kernel(
            spec.head_dim, transformer_engine=attention is not None and cudnn_backward.load()
        )
        # One sequence alone has a faster pair of kernels, torch's own of cuDNN, where neither bits nor a backward ask.
        self._attention_alone = attention if exact or by_cudnn(self._attention_backward) else None
        self._frequencies = inverse_frequencies(spec).to(device.torch_device)
        self._states: dict[str, AdapterState | BaseState] = {}

    @property
    def token_multiple(self) -> int:
        """Microbatches must have a multiple of this many tokens (sequence parallelism splits them)."""
        return self.mesh.tp_size if self.sequence_parallel else 1

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> None:
        """See :meth:`Trainer.add_adapter`."""
        if name in self._states:
            raise AdapterError(f"the trainer already has an adapter named {name!r}")
        self._refuse_without_base("an adapter")
        if spec.rank > self.spec.hidden_size:
            raise AdapterError(f"lora.rank={spec.rank} exceeds the model's hidden size {self.spec.hidden_size}")
        self._states[name] = AdapterState(
            self.spec, spec, self.mesh, seed=seed, dtype=self.dtype, device=self.device.torch_device
        )

    def remove_adapter(self, name: str) -> None:
        """Frees its state."""
        state = self._state(name)
        if isinstance(state, BaseState):
            state.release()
        del self._states[name]

    def adapters(self) -> Mapping[str, LoraSpec]:
        """The adapters by name."""
        return {name: state.spec for name, state in self._states.items() if isinstance(state, AdapterState)}

    def train_base(self, name: str) -> None:
        """See :meth:`Trainer.train_base`."""
        if self._states:
            raise AdapterError(f"the base model cannot be trained beside {sorted(self._states)}, which are made for it")
        self._states[name] = BaseState(self.spec, self._weights, self.mesh, sequence_parallel=self.sequence_parallel)

    def base_weights(self) -> Mapping[str, Tensor]:
        """See :meth:`Trainer.base_weights`."""
        return self._weights

    def export_base(self, name: str) -> Mapping[str, Tensor]:
        """See :meth:`Trainer.export_base`."""
        state = self._state(name)
        if not isinstance(state, BaseState):
            raise AdapterError(f"{name!r} is an adapter: export_adapter gives its factors, the base model is unchanged")
        return state.export()

    def forward(self, name: str | None, batch: Batch) -> ForwardResult:
        """See :meth:`Trainer.forward`."""
        results: list[tuple[Microbatch, Tensor, Tensor]] = []
        with torch.no_grad(), self._adapter_on(name, grad=None):
            for microbatch in batch.microbatches:
                with self.mesh.watchdog.watch("the forward pass of a microbatch"):
                    logprobs, entropy = self._logprobs(microbatch, batch.temperature)
                results.append((microbatch, logprobs, entropy))
        return _by_datum(results, batch.num_datums)

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> ForwardBackwardResult:
        """See :meth:`Trainer.forward_backward`."""
        state = self._state(name)
        grad = state.new_gradient()
        loss, metrics = 0.0, dict[str, Metric]()
        results: list[tuple[Microbatch, Tensor, Tensor]] = []
        with self._adapter_on(name, grad=grad):
            for index, microbatch in enumerate(batch.microbatches):
                number = state.num_microbatches + index
                self._switch.dropout_counter = number * self.mesh.dp_size + self.mesh.dp_rank
                with self.mesh.watchdog.watch("the forward pass of a microbatch"):
                    logprobs, entropy = self._logprobs(microbatch, batch.temperature)
                output = loss_fn(self._loss_inputs(microbatch, logprobs, entropy))
                if output.per_token.shape != logprobs.shape:
                    raise ConfigError(
                        f"the loss function returned per_token of shape {tuple(output.per_token.shape)}; "
                        f"it must have one entry per scored token, {tuple(logprobs.shape)}"
                    )
                total = (output.per_token * microbatch.weights.to(logprobs.device)).sum()
                with self.mesh.watchdog.watch("the backward pass of a microbatch"):
                    total.backward()
                    loss += total.item()
                _merge(metrics, output.metrics)
                results.append((microbatch, logprobs.detach(), entropy.detach()))
        state.accumulate(grad)
        state.num_microbatches += len(batch.microbatches)
        return ForwardBackwardResult(loss=loss, metrics=metrics, result=_by_datum(results, batch.num_datums))

    def optim_step(self, name: str, params: AdamParams) -> OptimResult:
        """See :meth:`Trainer.optim_step`."""
        with self.mesh.watchdog.watch("an optimizer step"):
            return self._state(name).optim_step(params)

    def zero_grad(self, name: str) -> None:
        """Forgets the accumulated gradient."""
        self._state(name).zero_grad()

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        """See :meth:`Trainer.adapter_shards`."""
        return self._adapter(name).shards()

    def export_adapter(self, name: str) -> Mapping[str, npt.NDArray[np.float32]]:
        """See :meth:`Trainer.export_adapter`."""
        return {key: tensor.numpy() for key, tensor in self._adapter(name).gather().items()}

    def import_adapter(self, name: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """See :meth:`Trainer.import_adapter`."""
        state = self._adapter(name)
        expected = dict(state.whole_shapes())
        if set(expected) != set(tensors):
            odd = sorted(set(expected) ^ set(tensors))
            raise AdapterError(f"adapter {name!r}: these tensors are missing or unknown: {odd[:6]} ({len(odd)} in all)")
        for key, shape in expected.items():
            if tensors[key].shape != shape:
                raise AdapterError(f"adapter {name!r}: {key} has shape {tensors[key].shape}, must be {shape}")
        state.scatter({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in tensors.items()})

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """See :meth:`Trainer.state_dict`."""
        return self._state(name).state_dict()

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainer.load_state_dict`."""
        self._state(name).load_state_dict(state)

    def logits(self, name: str | None, input_ids: Tensor) -> Tensor:
        """Whole logits of one sequence, for comparison with other implementations.

        Args:
            name: adapter, or None for the base.
            input_ids: ``[T]`` int64; T must be a multiple of :attr:`token_multiple`.

        Returns:
            ``[T, vocab]`` float32, the same on every rank.
        """
        return self._whole_logits(name, input_ids, slice(None))

    def extend(self, name: str | None, past: Any, token_ids: Tensor, *, keep: int) -> tuple[Tensor, Any]:
        """Logits ``[keep, vocab]`` float32 on the host after the last ``keep`` of ``token_ids``, and the new past.

        There is no cache of keys and values: the past is the tokens, and all of them are read again.

        Args:
            name: adapter, or None for the base model.
            past: as returned by the call that read the tokens before; None at the start.
            token_ids: ``[n]`` int64, of one sequence.
            keep: 1 to n.
        """
        whole = token_ids if past is None else torch.cat([past, token_ids])
        padded = torch.nn.functional.pad(whole, (0, -len(whole) % self.token_multiple))  # nothing looks to its right
        return self._whole_logits(name, padded, slice(len(whole) - keep, len(whole))).to(HOST), whole

    def _whole_logits(self, name: str | None, input_ids: Tensor, positions: slice) -> Tensor:
        """``[positions, vocab]`` float32 of one sequence of a multiple of :attr:`token_multiple` tokens."""
        count = len(input_ids)
        offsets = torch.tensor([0, count], dtype=torch.int32)
        with torch.no_grad(), self._adapter_on(name, grad=None):
            hidden = self._hidden(input_ids, torch.arange(count), offsets, count)[positions]
            local = self._vocab.pointwise.logits(hidden, self._vocab.weight).float()
        if self.mesh.tp_size == 1:
            return local
        width = self._vocab.padded_rows
        padded = torch.nn.functional.pad(local, (0, width - local.shape[1]))
        parts = mappings.gather_from_tensor_model_parallel_region(padded, group=self.mesh.tp_group)
        return parts[:, : self.spec.vocab_size]

    def _state(self, name: str) -> AdapterState | BaseState:
        if name not in self._states:
            raise AdapterError(f"the trainer has no adapter named {name!r}; it has {sorted(self._states)}")
        return self._states[name]

    def _adapter(self, name: str) -> AdapterState:
        state = self._state(name)
        if isinstance(state, BaseState):
            raise AdapterError(f"{name!r} is the base model itself under training (lora=none), not an adapter")
        return state

    def _refuse_without_base(self, wanted: str) -> None:
        trained = next((name for name, state in self._states.items() if isinstance(state, BaseState)), None)
        if trained is not None:
            raise AdapterError(
                f"{wanted} needs the base model as it was, but {trained!r} trains its weights in place (lora=none)"
            )

    @contextmanager
    def _adapter_on(self, name: str | None, *, grad: Tensor | None) -> Iterator[None]:
        """Switches an adapter on for the block; ``grad`` is where a backward pass inside it adds to."""
        if name is None:
            self._refuse_without_base("a forward pass without an adapter")
        else:
            self._state(name).switch_on(self._switch, grad)
        self._switch.training = grad is not None
        try:
            yield
        finally:
            self._switch.modules, self._switch.training = {}, False

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """``[T, hidden]`` after the final norm, whole on every rank."""
        device = self.device.torch_device
        tokens, positions = input_ids.to(device), position_ids.to(device)
        packed = plan(
            positions,
            cu_seqlens,
            max_seqlen,
            self._frequencies,
            dtype=self.dtype,
            varlen=self.device.varlen_attention,
            kernel=self._attention if len(cu_seqlens) > 2 else self._attention_alone,
            backward=self._attention_backward,
        )
        hidden = self._model(tokens[None], positions[None], attention_mask=None, packed_seq_params=packed)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(hidden, group=self.mesh.tp_group)
        if self.mesh.tp_size > 1:
            return mappings.copy_to_tensor_model_parallel_region(hidden, group=self.mesh.tp_group)
        return hidden

    def _check(self, microbatch: Microbatch) -> None:
        """Refuses tokens and lengths the model has never seen, on the host, before anything is computed."""
        vocab, context = self.spec.vocab_size, self.spec.max_position_embeddings
        for what, ids in (("input_ids", microbatch.input_ids), ("target_ids", microbatch.target_ids)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
                raise DataError(
                    f"{what} has a token id {int(ids.max() if ids.max() >= vocab else ids.min())}, "
                    f"this model's vocabulary is 0 to {vocab - 1}"
                )
        if microbatch.max_seqlen > context:
            raise DataError(f"a sequence of {microbatch.max_seqlen} tokens exceeds this model's context of {context}")

    def _logprobs(self, microbatch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        self._check(microbatch)
        hidden = self._hidden(
            microbatch.input_ids, microbatch.position_ids, microbatch.cu_seqlens, microbatch.max_seqlen
        )
        device = hidden.device
        scored, targets = microbatch.scored.to(device), microbatch.target_ids.to(device)
        vocab = replace(self._vocab, weight=self._head[: len(self._vocab.weight)])  # anew: a graph is made once
        return logprobs_and_entropy(hidden.index_select(0, scored), targets, vocab, temperature)

    def _loss_inputs(self, microbatch: Microbatch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
        device = logprobs.device
        return LossInputs(
            logprobs=logprobs,
            entropy=entropy,
            weights=microbatch.weights.to(device),
            sequence_ids=microbatch.sequence_ids.to(device),
            num_sequences=microbatch.num_sequences,
            fields={name: values.to(device) for name, values in microbatch.fields.items()},
        )


def _vocab_shard(spec: ModelSpec, mesh: Mesh, head: Tensor, pointwise: Pointwise) -> VocabShard:
    start = mesh.tp_rank * len(head)
    rows = min(max(spec.vocab_size - start, 0), len(head))
    return VocabShard(
        weight=head[:rows],
        start=start,
        padded_rows=len(head),
        group=mesh.tp_group,
        group_size=mesh.tp_size,
        pointwise=pointwise,
    )


def _pointwise(device: Device, *, exact: bool) -> Pointwise:
    if not device.compiles_kernels:
        return PLAIN
    from framework.trainer.megatron.kernels import EXACT, KERNELS  # need a kernel compiler

    return EXACT if exact else KERNELS


def _merge(metrics: dict[str, Metric], new: Mapping[str, Metric]) -> None:
    for name, metric in new.items():
        before = metrics.get(name, Metric(sum=0.0, count=0.0))
        metrics[name] = Metric(sum=before.sum + metric.sum, count=before.count + metric.count)


def _by_datum(results: list[tuple[Microbatch, Tensor, Tensor]], num_datums: int) -> ForwardResult:
    """Cuts each microbatch's tokens back into its datums."""
    columns: tuple[list[npt.NDArray[np.float32]], ...] = ([], [])
    for column in columns:
        column.extend(np.empty(0, dtype=np.float32) for _ in range(num_datums))
    for microbatch, *values in results:
        counts = torch.bincount(microbatch.sequence_ids, minlength=microbatch.num_sequences).tolist()
        for column, flat in zip(columns, values, strict=True):
            for datum, part in zip(microbatch.datum_ids, flat.cpu().split(counts), strict=True):
                column[datum] = part.numpy()
    return ForwardResult(logprobs=tuple(columns[0]), entropy=tuple(columns[1]))
