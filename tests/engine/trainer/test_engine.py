"""Sampling with the trainer's own model: against transformers' generate, against the trainer's logprobs, over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.batching import Example, pack
from framework.engine.base import SampleRequest, generate
from framework.engine.trainer.engine import TrainerEngine, TrainerEngineOptions
from framework.errors import AdapterError, ConfigError
from framework.lora.spec import LoraSpec
from framework.models.tiny import make_tiny_model
from framework.pair import end_tokens
from framework.trainer.hf.trainer import HfTrainer, load_model
from framework.types import AdamParams, AdapterRef, Completion, Prompt, SamplingParams
from framework.watchdog import Watchdog
from framework.weight_sync import VersionCounter, WeightSync
from tests.engine.trainer import scenario
from tests.fakes import tiny_tokenizer
from tests.ranks import run_ranks
from tests.trainer.hf.small import batch_of, datums, policy_gradient, trainer_of

EOS = 1
VOCAB = 320
PROMPT = (5, 6, 7, 8)


class Pair:
    """A reference trainer, its engine, and the way between them."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, max_adapters: int = 2) -> None:
        self.trainer: HfTrainer = trainer_of(folder, dtype)
        options = TrainerEngineOptions(
            max_model_len=64, max_num_seqs=3, max_adapters=max_adapters, vocab_size=VOCAB, end_tokens=frozenset({EOS})
        )
        watchdog = Watchdog(rank=0, world_size=1, timeout_s=600.0, store=None)
        self.engine = TrainerEngine(self.trainer, tiny_tokenizer(), options, watchdog=watchdog)
        self.sync = WeightSync(
            self.trainer,
            self.engine,
            VersionCounter(),
            synchronize=lambda: None,
            check_lockstep=lambda what, value: None,
        )

    def adapter(self, name: str, *, rank: int = 3, steps: int = 1) -> AdapterRef:
        """Published after some steps on made-up data."""
        if name not in self.trainer.adapters():
            self.trainer.add_adapter(name, LoraSpec(rank=rank, alpha=5.0), seed=rank)
        for _ in range(steps):
            self.trainer.forward_backward(name, batch_of(datums()), policy_gradient)
            self.trainer.optim_step(name, AdamParams(learning_rate=0.05))
        return self.sync.publish(name)

    def sample(
        self, adapter: AdapterRef | None, *, count: int = 1, prompt: Sequence[int] = PROMPT, **options: Any
    ) -> Any:
        """``count`` completions with seeds 0, 1, ...; one alone is not in a list."""
        values = {"max_tokens": 8, "ignore_eos": True, **options}
        requests = [
            SampleRequest(
                request_id=f"r{index}",
                prompt=Prompt(token_ids=tuple(prompt)),
                sampling=SamplingParams(**{"seed": index, **values}),
                adapter=adapter,
            )
            for index in range(count)
        ]
        done = generate(self.engine, requests)
        return done[0] if count == 1 else done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("engine") / "model", family="qwen3", vocab_size=VOCAB)


@pytest.fixture
def pair(folder: Path) -> Pair:
    return Pair(folder)


def trainer_logprobs(pair: Pair, name: str | None, completion: Completion, temperature: float) -> Any:
    """The trainer's own, of the same tokens: of the prompt's from the second on, then of the completion's."""
    tokens = np.asarray([*PROMPT, *completion.token_ids])
    count = len(tokens) - 1
    example = Example(
        input_ids=tokens[:-1],
        scored=np.arange(count),
        target_ids=tokens[1:],
        weights=np.ones(count, dtype=np.float32),
    )
    return pair.trainer.forward(name, pack([example], max_tokens=100, temperature=temperature)).logprobs[0]


def test_greedy_is_what_transformers_generates(pair: Pair, folder: Path) -> None:
    model = load_model(folder, torch.float32)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert pair.sample(None, temperature=0.0).token_ids == tuple(expected[0, len(PROMPT) :].tolist())


def test_logprobs_of_samples_and_prompts_are_the_trainers(pair: Pair) -> None:
    ref = pair.adapter("policy")
    for name, adapter in ((None, None), ("policy", ref)):
        done = pair.sample(adapter, temperature=0.7, prompt_logprobs=True)
        drawn = trainer_logprobs(pair, name, done, 0.7)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(done.sampling_logprobs, drawn, atol=1e-5)
        assert done.prompt_logprobs[0] is None
        prompt = trainer_logprobs(pair, name, done, 1.0)[: len(PROMPT) - 1]
        np.testing.assert_allclose(done.prompt_logprobs[1:], prompt, atol=1e-5)
        assert (done.adapter, done.stop_reason, len(done.token_ids)) == (adapter, "length", 8)


def test_a_version_stays_what_it_was_while_its_adapter_trains_on(pair: Pair) -> None:
    first = pair.adapter("policy")
    before = pair.sample(first)
    second = pair.adapter("policy", steps=3)
    assert pair.sample(first) == before
    assert pair.sample(second).sampling_logprobs != before.sampling_logprobs
    pair.trainer.remove_adapter("policy")
    assert pair.sample(first) == before


def test_what_is_pushed_in_half_precision_is_read_back_bit_for_bit(folder: Path) -> None:
    pair = Pair(folder, dtype=torch.bfloat16)
    ref = pair.adapter("policy")  # publish compares
    held, pushed = pair.engine.read_adapter(ref), pair.trainer.adapter_shards("policy")
    assert all(torch.equal(held[path].b, shard.b) and shard.b.any() for path, shard in pushed.items())
    pair.sync.verify(ref)


def test_seeds_repeat_and_nobody_else_in_flight_changes_a_request(pair: Pair) -> None:
    ref = pair.adapter("policy")
    alone = [pair.sample(ref, seed=seed) for seed in range(5)]
    together = pair.sample(ref, count=5)
    assert list(together) == alone
    assert len({done.token_ids for done in alone}) == 5
    unseeded = [pair.sample(ref, seed=None).token_ids for _ in range(4)]
    assert len(set(unseeded)) == 4


def test_completions_end_at_end_tokens_stop_tokens_and_stop_strings(pair: Pair) -> None:
    whole = pair.sample(None, max_tokens=20)
    target = whole.token_ids[6]
    at = whole.token_ids.index(target)
    endings: list[dict[str, Any]] = [{"stop_token_ids": (target,)}, {"stop": (tiny_tokenizer().decode([target]),)}]
    for options in endings:
        cut = pair.sample(None, max_tokens=20, **options)
        assert (cut.token_ids, cut.stop_reason) == (whole.token_ids[: len(cut.token_ids)], "stop")
        assert cut.token_ids[-1] == target or "stop" in options
        assert len(cut.token_ids) <= at + 1
    ending = TrainerEngineOptions(
        max_model_len=64, max_num_seqs=3, max_adapters=2, vocab_size=VOCAB, end_tokens=frozenset({target})
    )
    pair.engine = TrainerEngine(
        pair.trainer, tiny_tokenizer(), ending, watchdog=Watchdog(rank=0, world_size=1, timeout_s=600.0, store=None)
    )
    ended = pair.sample(None, max_tokens=20, ignore_eos=False)
    assert (ended.token_ids, ended.stop_reason) == (whole.token_ids[: at + 1], "stop")
    assert pair.sample(None, max_tokens=20) == whole


def test_alternatives_of_sampled_and_of_prompt_tokens(pair: Pair) -> None:
    done = pair.sample(None, temperature=0.0, top_logprobs=3, top_prompt_logprobs=2)
    assert [row[0] for row in done.top_logprobs] == list(zip(done.token_ids, done.sampling_logprobs, strict=True))
    assert [len(row) for row in done.top_logprobs] == [3] * 8
    assert [len(row) for row in done.top_prompt_logprobs] == [0, 2, 2, 2]
    assert all(
        best[1] >= own for (best, _), own in zip(done.top_prompt_logprobs[1:], done.prompt_logprobs[1:], strict=True)
    )


def test_slots_are_limited_given_back_and_reused_for_other_ranks(pair: Pair) -> None:
    first, second = pair.adapter("one", rank=2), pair.adapter("two", rank=4)
    with pytest.raises(AdapterError, match="all 2 adapter slots"):
        pair.adapter("one", rank=2)
    pair.engine.unload_adapter(first)
    with pytest.raises(AdapterError, match="not loaded"):
        pair.sample(first)
    third = pair.adapter("three", rank=5)
    assert len([name for name in pair.trainer.adapters() if name.startswith("engine/")]) == 2
    assert pair.sample(second).sampling_logprobs != pair.sample(third).sampling_logprobs
    request = SampleRequest(
        request_id="r", prompt=Prompt(token_ids=PROMPT), sampling=SamplingParams(max_tokens=2), adapter=third
    )
    pair.engine.submit(request)
    with pytest.raises(AdapterError, match="still sample"):
        pair.engine.unload_adapter(third)
    pair.engine.abort(["r", "unknown"])
    pair.engine.unload_adapter(third)
    assert not pair.engine.has_unfinished()


def test_streams_and_waiting_requests(pair: Pair) -> None:
    for index in range(4):  # three are worked on at once
        pair.engine.submit(
            SampleRequest(
                request_id=f"r{index}",
                prompt=Prompt(token_ids=PROMPT),
                sampling=SamplingParams(max_tokens=2, ignore_eos=True),
                adapter=None,
                stream=index != 1,
            )
        )
    steps = [pair.engine.step() for _ in range(4)]
    assert [sorted(step.new_tokens) for step in steps] == [["r0", "r2"], ["r0", "r2"], ["r3"], ["r3"]]
    assert [sorted(step.finished) for step in steps] == [[], ["r0", "r1", "r2"], [], ["r3"]]
    assert pair.engine.step().finished == {}


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "complaint"),
    [((), 1, "no tokens"), ((VOCAB,), 1, "outside the vocabulary"), ((1,) * 60, 5, "exceed the context of 64")],
)
def test_a_request_that_cannot_be_is_refused(
    pair: Pair, prompt: tuple[int, ...], max_tokens: int, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pair.sample(None, prompt=prompt, max_tokens=max_tokens)


def test_end_tokens_are_the_tokenizers_and_the_models(tmp_path: Path) -> None:
    assert end_tokens(tmp_path, tiny_tokenizer()) == {1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(tmp_path, tiny_tokenizer()) == {1, 7, 9}


def test_the_megatron_trainer_samples_on_two_ranks_what_the_reference_samples(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", family="llama", vocab_size=VOCAB)
    tiny_tokenizer().save_pretrained(model)
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    results = run_ranks("tests.engine.trainer.scenario:on_ranks", ranks, nproc=2, model=str(model))
    assert all(result == results[0] for result in results)
    options = TrainerEngineOptions(
        max_model_len=64, max_num_seqs=8, max_adapters=2, vocab_size=VOCAB, end_tokens=frozenset()
    )
    reference = Pair(model)
    reference.engine = TrainerEngine(
        reference.trainer,
        tiny_tokenizer(),
        options,
        watchdog=Watchdog(rank=0, world_size=1, timeout_s=600.0, store=None),
    )
    sync = WeightSync(
        reference.trainer,
        reference.engine,
        VersionCounter(),
        synchronize=lambda: None,
        check_lockstep=lambda what, value: None,
    )
    for (tokens, logprobs, prompt), done in zip(
        results[0], scenario.sample((reference.engine, reference.trainer, sync)), strict=True
    ):
        assert tokens == done.token_ids
        np.testing.assert_allclose(logprobs, done.sampling_logprobs, atol=2e-5)
        assert prompt is not None
        assert done.prompt_logprobs is not None
        np.testing.assert_allclose(np.array(prompt[1:]), np.array(done.prompt_logprobs[1:]), atol=2e-5)
