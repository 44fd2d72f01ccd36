"""A toy trainer and engine that really train and really sample, in milliseconds: a bigram model over ASCII.

logits(next | x) = W[:, x] + scale * sum over targets of (B A)[:, x]. The trainer owns A and B per adapter and target,
with torch autograd and AdamW; the engine samples from whatever factors were pushed into its slots. Nothing is canned,
so train, push, sample is observable, and a version that is mixed up shows in the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from framework.algorithms.base import LossFn, LossInputs
from framework.batching import Batch, Microbatch
from framework.engine.base import SampleRequest, StepOutput
from framework.errors import AdapterError, ConfigError
from framework.lora.spec import LoraSpec
from framework.trainer.base import ForwardBackwardResult, ForwardResult, LoraShard, OptimResult
from framework.types import AdamParams, AdapterRef, Completion

VOCAB = 128
EOS = 0
CONTEXT = 512


def module(target: str) -> str:
    """Path of a projection, as a one-layer model would have it."""
    return f"model.layers.0.{'mlp' if target in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{target}"


def base_table() -> Tensor:
    """``[next, current]`` logits of the base model."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(7)) * 0.5


@dataclass
class ToyAdapter:
    spec: LoraSpec
    tensors: dict[str, Tensor]
    """a, b, their Adam moments and gradients, and the step count."""


def factor_names(spec: LoraSpec) -> list[str]:
    """Keys of the factors in an adapter's tensors."""
    return [f"{target}.{kind}" for target in spec.targets for kind in "ab"]


def _peft_name(key: str) -> str:
    target, kind = key.split(".")
    return f"{module(target)}.lora_{kind.upper()}.weight"


class ToyTrainer:
    """The Trainer Protocol on one rank."""

    def __init__(self, *, seconds_per_call: float = 0.0) -> None:
        self.table = base_table()
        self.loaded: dict[str, ToyAdapter] = {}
        self.seconds_per_call = seconds_per_call
        self.fail_at_call: int | None = None
        self.calls = 0

    @property
    def token_multiple(self) -> int:
        return 1

    def add_adapter(self, name: str, spec: LoraSpec, *, seed: int) -> None:
        if name in self.loaded:
            raise AdapterError(f"the trainer already has an adapter named {name!r}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {"step": torch.zeros(1)}
        for target in spec.targets:
            tensors[f"{target}.a"] = (torch.rand(spec.rank, VOCAB, generator=generator) - 0.5) * 0.2
            tensors[f"{target}.b"] = torch.zeros(VOCAB, spec.rank)
        for key in factor_names(spec):
            for kind in ("grad", "m", "v"):
                tensors[f"{key}.{kind}"] = torch.zeros_like(tensors[key])
        self.loaded[name] = ToyAdapter(spec=spec, tensors=tensors)

    def remove_adapter(self, name: str) -> None:
        del self.loaded[name]

    def train_base(self, name: str) -> None: ...

    def base_weights(self) -> Mapping[str, Tensor]:
        return {}

    def export_base(self, name: str) -> Mapping[str, Tensor]:
        return {}

    def adapters(self) -> Mapping[str, LoraSpec]:
        return {name: adapter.spec for name, adapter in self.loaded.items()}

    def _logprobs(self, microbatch: Microbatch, factors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        tokens = microbatch.input_ids[microbatch.scored]
        logits = self.table[:, tokens]
        for key in factors:
            if key.endswith(".a"):
                logits = logits + scale * (factors[key[:-1] + "b"] @ factors[key][:, tokens])
        full = torch.log_softmax(logits.T, dim=-1)
        picked = full.gather(1, microbatch.target_ids[:, None])[:, 0]
        return picked, -(full.exp() * full).sum(-1)

    def _factors(self, name: str) -> dict[str, Tensor]:
        adapter = self.loaded[name]
        return {key: adapter.tensors[key] for key in factor_names(adapter.spec)}

    def forward(self, name: str | None, batch: Batch) -> ForwardResult:
        time.sleep(self.seconds_per_call)
        logprobs: dict[int, npt.NDArray[np.float32]] = {}
        entropy: dict[int, npt.NDArray[np.float32]] = {}
        for microbatch in batch.microbatches:
            factors = {} if name is None else self._factors(name)
            values = self._logprobs(microbatch, factors, 0.0 if name is None else self.loaded[name].spec.scale)
            _scatter(logprobs, microbatch, values[0])
            _scatter(entropy, microbatch, values[1])
        order = range(batch.num_datums)
        return ForwardResult(logprobs=tuple(logprobs[i] for i in order), entropy=tuple(entropy[i] for i in order))

    def forward_backward(self, name: str, batch: Batch, loss_fn: LossFn) -> ForwardBackwardResult:
        self.calls += 1
        if self.calls == self.fail_at_call:
            raise RuntimeError("the toy trainer was told to fail here")
        time.sleep(self.seconds_per_call)
        state = self.loaded[name]
        factors = {key: value.clone().requires_grad_() for key, value in self._factors(name).items()}
        loss = torch.zeros(())
        logprobs: dict[int, npt.NDArray[np.float32]] = {}
        for microbatch in batch.microbatches:
            picked, entropy = self._logprobs(microbatch, factors, state.spec.scale)
            inputs = LossInputs(
                logprobs=picked,
                entropy=entropy,
                weights=microbatch.weights,
                sequence_ids=microbatch.sequence_ids,
                num_sequences=microbatch.num_sequences,
                fields=microbatch.fields,
            )
            loss = loss + (loss_fn(inputs).per_token * microbatch.weights).sum()
            _scatter(logprobs, microbatch, picked.detach())
        grads = torch.autograd.grad(loss, list(factors.values()))
        for key, grad in zip(factors, grads, strict=True):
            state.tensors[f"{key}.grad"] += grad
        values = tuple(logprobs[i] for i in range(batch.num_datums))
        result = ForwardResult(logprobs=values, entropy=values)
        return ForwardBackwardResult(loss=loss.item(), metrics={}, result=result)

    def optim_step(self, name: str, params: AdamParams) -> OptimResult:
        state, keys = self.loaded[name].tensors, factor_names(self.loaded[name].spec)
        norm = torch.stack([state[f"{key}.grad"].norm() for key in keys]).norm()
        if not torch.isfinite(norm):
            self.zero_grad(name)
            return OptimResult(grad_norm=norm.item(), step=int(state["step"]))
        factor = min(1.0, params.max_grad_norm / max(norm.item(), 1e-12)) if params.max_grad_norm else 1.0
        state["step"] += 1
        step = state["step"].item()
        for key in keys:
            grad = state[f"{key}.grad"] * factor
            state[f"{key}.m"].lerp_(grad, 1 - params.beta1)
            state[f"{key}.v"].mul_(params.beta2).addcmul_(grad, grad, value=1 - params.beta2)
            m = state[f"{key}.m"] / (1 - params.beta1**step)
            v = state[f"{key}.v"] / (1 - params.beta2**step)
            state[key].mul_(1 - params.learning_rate * params.weight_decay)
            state[key].sub_(params.learning_rate * m / (v.sqrt() + params.eps))
            state[f"{key}.grad"].zero_()
        return OptimResult(grad_norm=norm.item(), step=int(step))

    def zero_grad(self, name: str) -> None:
        for key in factor_names(self.loaded[name].spec):
            self.loaded[name].tensors[f"{key}.grad"].zero_()

    def adapter_shards(self, name: str) -> Mapping[str, LoraShard]:
        state, spec = self.loaded[name].tensors, self.loaded[name].spec
        return {module(t): LoraShard(a=state[f"{t}.a"], b=state[f"{t}.b"] * spec.scale) for t in spec.targets}

    def export_adapter(self, name: str) -> Mapping[str, npt.NDArray[np.float32]]:
        state, spec = self.loaded[name].tensors, self.loaded[name].spec
        return {_peft_name(key): state[key].numpy().copy() for key in factor_names(spec)}

    def import_adapter(self, name: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        state, keys = self.loaded[name].tensors, factor_names(self.loaded[name].spec)
        if set(tensors) != {_peft_name(key) for key in keys}:
            raise AdapterError(f"adapter {name!r}: the tensors are for other targets")
        for key in keys:
            if tensors[_peft_name(key)].shape != tuple(state[key].shape):
                raise AdapterError(f"{_peft_name(key)} has another shape than {tuple(state[key].shape)}")
        for value in state.values():
            value.zero_()
        for key in keys:
            state[key].copy_(torch.from_numpy(tensors[_peft_name(key)]))

    def state_dict(self, name: str) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.loaded[name].tensors.items()}

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        mine = self.loaded[name].tensors
        for key, value in mine.items():
            if state[key].shape != value.shape:
                raise AdapterError(f"{key} has shape {tuple(state[key].shape)}, must be {tuple(value.shape)}")
            value.copy_(state[key])


def _scatter(into: dict[int, npt.NDArray[np.float32]], microbatch: Microbatch, values: Tensor) -> None:
    counts = torch.bincount(microbatch.sequence_ids, minlength=microbatch.num_sequences).tolist()
    for datum, part in zip(microbatch.datum_ids, values.split(counts), strict=True):
        into[datum] = part.numpy()


@dataclass
class Flight:
    request: SampleRequest
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)


class ToyEngine:
    """The RolloutEngine Protocol on one rank: one token per request and step."""

    def __init__(self, *, max_adapters: int = 4, max_batch: int = 64, seconds_per_step: float = 0.0) -> None:
        self.table = base_table()
        self._max_adapters = max_adapters
        self.max_batch = max_batch
        self.slots: dict[AdapterRef, dict[str, LoraShard]] = {}
        self.flights: dict[str, Flight] = {}
        self.seconds_per_step = seconds_per_step
        self.loads = 0

    @property
    def max_adapters(self) -> int:
        return self._max_adapters

    @property
    def max_prompt_tokens(self) -> int:
        return CONTEXT

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        if len(self.slots) >= self._max_adapters:
            raise AdapterError(f"no slot is free for {ref}; engine.max_adapters={self._max_adapters}")
        assert ref not in self.slots
        assert ref.version not in {other.version for other in self.slots}
        self.slots[ref] = {path: LoraShard(a=s.a.clone(), b=s.b.clone()) for path, s in shards.items()}
        self.loads += 1

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        return self.slots[ref]

    def unload_adapter(self, ref: AdapterRef) -> None:
        assert not any(flight.request.adapter == ref for flight in self.flights.values()), f"{ref} is in use"
        del self.slots[ref]

    def submit(self, request: SampleRequest) -> None:
        if len(request.prompt.token_ids) + request.sampling.max_tokens > CONTEXT:
            raise ConfigError(f"the prompt has {len(request.prompt.token_ids)} tokens; the context has {CONTEXT}")
        if request.adapter is not None and request.adapter not in self.slots:
            raise AdapterError(f"{request.adapter} is not loaded")
        assert request.request_id not in self.flights, "request ids are unique"
        seed = request.sampling.seed
        self.flights[request.request_id] = Flight(request=request, rng=np.random.default_rng(seed))

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.flights.pop(request_id, None)

    def _column(self, token: int, ref: AdapterRef | None) -> npt.NDArray[np.float64]:
        logits = self.table[:, token]
        if ref is not None:
            for shard in self.slots[ref].values():
                logits = logits + shard.b @ shard.a[:, token]
        return logits.double().numpy()

    def step(self) -> StepOutput:
        if self.flights:
            time.sleep(self.seconds_per_step)
        finished: dict[str, Completion] = {}
        new: dict[str, tuple[int, ...]] = {}
        for name in list(self.flights)[: self.max_batch]:
            flight = self.flights[name]
            stop = self._advance(flight)
            if flight.request.stream:
                new[name] = (flight.tokens[-1],)
            if stop is not None:
                finished[name] = self._completion(self.flights.pop(name), stop)
        return StepOutput(finished=finished, new_tokens=new)

    def _advance(self, flight: Flight) -> Any:
        sampling = flight.request.sampling
        current = flight.tokens[-1] if flight.tokens else flight.request.prompt.token_ids[-1]
        logits = self._column(current, flight.request.adapter)
        logprobs = _log_softmax(logits if sampling.temperature == 0 else logits / sampling.temperature)
        if sampling.temperature == 0:
            token = int(np.argmax(logprobs))
        else:
            token = int(flight.rng.choice(VOCAB, p=np.exp(logprobs) / np.exp(logprobs).sum()))
        flight.tokens.append(token)
        flight.logprobs.append(float(logprobs[token]))
        flight.top.append(_top(logprobs, sampling.top_logprobs))
        text = "".join(chr(t) for t in flight.tokens)
        if (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return "stop"
        if any(text.endswith(stop) for stop in sampling.stop):
            return "stop"
        return "length" if len(flight.tokens) >= sampling.max_tokens else None

    def _completion(self, flight: Flight, stop: Any) -> Completion:
        sampling, prompt = flight.request.sampling, flight.request.prompt.token_ids
        prompt_logprobs: tuple[float | None, ...] | None = None
        top_prompt = None
        if sampling.prompt_logprobs:
            rows = [_log_softmax(self._column(token, flight.request.adapter)) for token in prompt[:-1]]
            prompt_logprobs = (None, *(float(row[token]) for row, token in zip(rows, prompt[1:], strict=True)))
            top_prompt = ((), *(_top(row, sampling.top_prompt_logprobs) for row in rows))
        return Completion(
            token_ids=tuple(flight.tokens),
            sampling_logprobs=tuple(flight.logprobs),
            stop_reason=stop,
            adapter=flight.request.adapter,
            prompt_logprobs=prompt_logprobs,
            top_logprobs=tuple(flight.top) if sampling.top_logprobs else None,
            top_prompt_logprobs=top_prompt if sampling.top_prompt_logprobs else None,
        )

    def has_unfinished(self) -> bool:
        return bool(self.flights)

    def sleep(self) -> None:
        assert not self.flights

    def wake(self) -> None:
        pass


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _top(logprobs: npt.NDArray[np.float64], k: int) -> tuple[tuple[int, float], ...]:
    order = np.argsort(-logprobs)[:k]
    return tuple((int(token), float(logprobs[token])) for token in order)


class OneRank:
    """The Mesh of a single process."""

    tp_rank = 0

    def broadcast(self, value: Any) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class AsciiTokenizer:
    """Token = character code; what the service asks of a transformers tokenizer."""

    eos_token_id = EOS
    chat_template = "{role}: {content}"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text if ord(character) < VOCAB]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in tokens if not (skip_special_tokens and token == EOS))

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> list[int]:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")
