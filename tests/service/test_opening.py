"""The contract: the real service as a process of its own, driven by the unmodified tinker SDK over HTTP.

Megatron and vLLM on one rank and on two, transformers + PEFT that samples with its own model, and SmolLM2.

Losses and gradients are compared with transformers + PEFT in float32. A gradient is read through one AdamW step with
``eps = learning_rate = 1000``: the weights then move by the gradient itself, up to its own thousandth.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

from framework.models.hub import DEFAULT_MODEL, default_cache_dir, resolve_model
from framework.models.tiny import make_tiny_model
from framework.service.opening import facts
from framework.service.settings import schema, split
from tests.ranks import clean_environment, free_port
from tests.service.toy_pair import toy_backend

os.environ.setdefault("TINKER_TELEMETRY", "0")
tinker = importlib.import_module("tinker")  # after the environment, which it reads at import
types = tinker.types
ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(3, VOCAB, size=n).tolist() for n in (12, 7, 9)]
NOISE = [RNG.normal(0.0, 0.3, size=len(t) - 1) for t in TOKENS]
"""By how much the sampler's logprobs differ from the trainer's: some ratios are clipped, some are not."""
PLAUSIBLE = [(noise - 6.2).tolist() for noise in NOISE]
ADVANTAGES = [RNG.normal(size=len(t) - 1).round(3).tolist() for t in TOKENS]
WEIGHTS = [RNG.normal(size=len(t) - 1).round(3).tolist() for t in TOKENS]


@dataclass(frozen=True)
class Server:
    """A running service."""

    url: str
    model: Path
    process: subprocess.Popen[bytes]
    real: bool


@dataclass(frozen=True)
class Backend:
    """What a service of this suite runs on; the tests are the same for all."""

    nproc: int = 1
    real: bool = False
    """SmolLM2 instead of a tiny model with random weights."""
    environment: Mapping[str, str] = field(default_factory=dict)


BACKENDS = {
    "tp1": Backend(),
    "tp2": Backend(nproc=2),
    "peft": Backend(environment={"USE_MEGATRON": "false", "USE_VLLM": "false"}),
    "smollm2": Backend(real=True),
}


@pytest.fixture(scope="module", params=BACKENDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    backend = BACKENDS[request.param]
    folder = tmp_path_factory.mktemp("service")
    model = resolve_model(DEFAULT_MODEL, cache_dir=default_cache_dir()).path if backend.real else _tiny(folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if backend.nproc == 2 else []
    keys = ["engine.kv_cache_gib=0.25", "engine.max_model_len=256", "engine.max_num_seqs=16"]
    keys += [
        f"service.port={free_port()}",
        f"service.data_dir={folder / 'data'}",
        "service.max_tokens_per_microbatch=16",
        "service.log_level=warning",
    ]
    environment = {
        **clean_environment(),
        **backend.environment,
        "VLLM_MODEL": str(model),
        "VLLM_DTYPE": "float32",
        "VLLM_TENSOR_PARALLEL_SIZE": str(backend.nproc),
    }
    process = subprocess.Popen([sys.executable, *launcher, "launch/serve.py", *keys], cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{keys[3].partition('=')[2]}"
    _wait(url, process)
    yield Server(url=url, model=model, process=process, real=backend.real)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    if backend.nproc == 1:  # torchrun tells of the signal by a code of its own
        assert code == 0


def _tiny(folder: Path) -> Path:
    model = make_tiny_model(folder / "model", family="llama", vocab_size=VOCAB)
    _tiny_tokenizer(model)
    return model


def _tiny_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{token}>": token for token in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", unk_token="<0>").save_pretrained(folder)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended while it started"
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError("the service did not start")


@pytest.fixture
def sdk(server: Server) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-test") as client:
        yield client


def test_the_first_line_of_the_log_says_what_is_in_force() -> None:
    run, service = split(schema())
    said = facts(run, service, toy_backend())
    assert (said["model"], said["tensor_parallel_size"], said["max_loras"]) == ("toy/bigram", 1, 4)
    assert (said["max_lora_rank"], said["mode"], said["auth"]) == (64, "megatron trains, vllm samples", "local")
    assert said["url"] == "http://127.0.0.1:8000"
    assert said["kv_cache_gib"] == 0.5
    own = replace(run, engine=replace(run.engine, backend="trainer"), trainer=replace(run.trainer, backend="hf"))
    assert facts(own, service, toy_backend())["mode"] == "hf trains, trainer samples"


def make(sdk: Any, server: Server, **options: Any) -> Any:
    return sdk.create_lora_training_client(base_model=str(server.model), **{"rank": 4, "seed": 1, **options}).result()


def data(loss_fn: str, sampling_logprobs: list[list[float]] | None = None) -> list[Any]:
    """Three datums with the inputs of a loss; the policy-gradient losses need the sampler's logprobs."""
    rows = []
    for index, (tokens, advantages, weights) in enumerate(zip(TOKENS, ADVANTAGES, WEIGHTS, strict=True)):
        inputs: dict[str, Any] = {"target_tokens": tokens[1:]}
        if loss_fn == "cross_entropy":
            inputs["weights"] = weights
        else:
            assert sampling_logprobs is not None
            inputs |= {"logprobs": sampling_logprobs[index], "advantages": advantages}
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = [1.0] * (len(tokens) - 1)
        rows.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return rows


def noisy_logprobs(client: Any) -> list[list[float]]:
    """The trainer's logprobs now, shifted by :data:`NOISE`: what a sampler might have reported."""
    outputs = client.forward(data("cross_entropy"), "cross_entropy").result().loss_fn_outputs
    return [
        (np.asarray(out["logprobs"].tolist()) + noise).round(3).tolist()
        for out, noise in zip(outputs, NOISE, strict=True)
    ]


def clip(ratio: torch.Tensor) -> torch.Tensor:
    return ratio.clamp(0.8, 1.2)


def gspo(lp: torch.Tensor, q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    ratio = torch.exp((lp.detach() - q).mean()) * torch.exp(lp - lp.detach())
    return -torch.minimum(ratio * a, clip(ratio) * a)


REFERENCE: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "importance_sampling": lambda lp, q, a: -torch.exp(lp - q) * a,
    "ppo": lambda lp, q, a: -torch.minimum(torch.exp(lp - q) * a, clip(torch.exp(lp - q)) * a),
    "cispo": lambda lp, q, a: -clip(torch.exp(lp - q)).detach() * lp * a,
    "dro": lambda lp, q, a: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2),
    "gspo": gspo,
}
"""(trainer's logprobs, sampler's logprobs, advantages) of one datum to its per-token loss."""


def download(client: Any, server: Server, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter as a PEFT folder, through the SDK's own way to export it."""
    path = client.save_weights_external(name).result().path
    run, name = path.removeprefix("tinker://").split("/")[0], path.rsplit("/", 1)[1]
    where = f"{server.url}/api/v1/training_runs/{run}/checkpoints/external_weights/{name}"
    urls = httpx.get(f"{where}/external_weights_urls").json()["urls"]
    folder.mkdir()
    for file, url in urls.items():
        (folder / file).write_bytes(httpx.get(url).raise_for_status().content)
    return load_safetensors(io.BytesIO((folder / "adapter_model.safetensors").read_bytes()).getvalue())


def reference(
    server: Server, folder: Path, loss_fn: str, sampling_logprobs: list[list[float]], dtype: torch.dtype = torch.float32
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradient of every factor by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(server.model, dtype=dtype)
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True).to(dtype)
    total = torch.zeros(())
    for tokens, logprobs, advantages, weights in zip(TOKENS, sampling_logprobs, ADVANTAGES, WEIGHTS, strict=True):
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
        lp = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        if loss_fn == "cross_entropy":
            total = total - (torch.tensor(weights) * lp).sum()
        else:
            total = total + REFERENCE[loss_fn](lp, torch.tensor(logprobs), torch.tensor(advantages)).sum()
    total.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return total.item(), grads


def errors(seen: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[float]:
    """Norm of the difference over the norm, of every factor."""
    return [float((seen[name] - value).norm() / (value.norm() + 1e-6)) for name, value in wanted.items()]


@pytest.mark.parametrize("loss_fn", ["cross_entropy", *REFERENCE])
def test_loss_and_gradient_are_pefts(sdk: Any, server: Server, tmp_path: Path, loss_fn: str) -> None:
    client = make(sdk, server)
    client.forward_backward(data("cross_entropy"), "cross_entropy").result()  # so that B is not zero
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    before = download(client, server, "before", tmp_path / "before")
    sampled = noisy_logprobs(client)
    loss, grads = reference(server, tmp_path / "before", loss_fn, sampled)
    done = client.forward_backward(data(loss_fn, sampled), loss_fn)
    client.optim_step(types.AdamParams(learning_rate=1e3, eps=1e3, beta1=0.0, beta2=0.0)).result()
    after = download(client, server, "after", tmp_path / "after")
    tolerance = 5e-5 if server.real else 1e-5  # of thirty layers in float32, without AVX-512 in particular
    assert done.result().metrics["loss:sum"] == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert set(grads) == set(before)
    moved = {name: before[name] - after[name] for name in grads}  # g / (1 + |g| / 1000)
    measured = {name: by / (1.0 - by.abs() / 1e3) for name, by in moved.items()}
    if not server.real:
        assert max(errors(measured, grads)) <= 1e-5
        return
    # Thirty layers round PEFT's own float32 gradient by more than that, by how much is the processor's: compare both
    # with float64.
    _, exact = reference(server, tmp_path / "before", loss_fn, sampled, torch.float64)
    ours, pefts = errors(measured, exact), errors(grads, exact)
    assert max(ours) <= min(2.0 * max(pefts), 1e-3), (max(ours), max(pefts))
    assert sum(ours) <= sum(pefts)


def test_the_sampler_is_the_trainer_after_every_step(sdk: Any, server: Server) -> None:
    tolerance = 1e-4 if server.real else 1e-5  # of thirty layers in float32
    client = make(sdk, server, rank=8)
    prompt = types.ModelInput.from_ints(TOKENS[0])
    for _ in range(3):
        client.forward_backward(data("cross_entropy")[:1], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        sampler = client.save_weights_and_get_sampling_client().result()
        output = client.forward(data("cross_entropy")[:1], "cross_entropy").result().loss_fn_outputs[0]
        np.testing.assert_allclose(
            sampler.compute_logprobs(prompt).result()[1:], output["logprobs"].tolist(), rtol=tolerance, atol=tolerance
        )
        drawn = sampler.sample(
            types.ModelInput.from_ints(TOKENS[0][:4]),
            num_samples=2,
            sampling_params=types.SamplingParams(max_tokens=6, seed=1),
        ).result()
        for sequence in drawn.sequences:
            whole = TOKENS[0][:4] + list(sequence.tokens)
            scored = client.forward(
                [
                    types.Datum(
                        model_input=types.ModelInput.from_ints(whole[:-1]),
                        loss_fn_inputs={"target_tokens": whole[1:], "weights": [1.0] * (len(whole) - 1)},
                    )
                ],
                "cross_entropy",
            ).result()
            np.testing.assert_allclose(
                scored.loss_fn_outputs[0]["logprobs"].tolist()[3:],
                list(sequence.logprobs),
                rtol=tolerance,
                atol=tolerance,
            )


def test_a_tenant_is_bit_for_bit_what_it_is_alone(sdk: Any, server: Server) -> None:
    def losses(client: Any, others: list[Any]) -> list[float]:
        seen = []
        for _ in range(3):
            done = client.forward_backward(data("cross_entropy"), "cross_entropy")
            for other in others:
                other.forward_backward(data("ppo", PLAUSIBLE), "ppo")
                other.optim_step(types.AdamParams(learning_rate=3e-2))
            client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
            seen.append(done.result().metrics["loss:sum"])
        return seen

    alone = losses(make(sdk, server, rank=4), [])
    others = [make(sdk, server, rank=rank, seed=rank) for rank in (1, 4, 16)]
    assert losses(make(sdk, server, rank=4), others) == alone
