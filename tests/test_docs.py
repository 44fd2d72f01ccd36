"""The documentation is true: every snippet of docs/extending.md runs, every command line in docs/ is accepted."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from framework.algorithms.base import LossInputs
from framework.algorithms.catalog import algorithm_config, build_algorithm
from framework.config import RunConfig, to_typed
from framework.data.chat import Chat
from framework.device import open_device
from framework.engine.base import SampleRequest
from framework.environments.catalog import EnvironmentConfig, build_problems
from framework.lora.spec import LoraSpec
from framework.overrides import check_overrides, with_prefixes
from framework.rollout import collect
from framework.runtime import POLICY
from framework.tracking import SilentTracker
from framework.trainer.base import LoraShard
from framework.trainer.hf.trainer import HfTrainer
from framework.types import AdapterRef, SamplingParams
from framework.weight_sync import VersionCounter, WeightSync
from launch.train import CONF
from recipes import RECIPES, choose
from tests.fakes import OneRank, ScriptedEngine, tiny_checkpoint, tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n# (mine/\w+\.py)\n(.*?)```", re.DOTALL)
MAX_LINES = 20


def snippets() -> list[tuple[str, str]]:
    """File and code of every snippet, in the page's order."""
    return BLOCK.findall((DOCS / "extending.md").read_text())


def commands() -> list[list[str]]:
    """The arguments of every ``torchrun launch/train.py`` in an indented block of any page."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text().replace("\\\n", " ")
        found += [
            shlex.split(line, comments=True)[2:]
            for line in text.splitlines()
            if line.startswith("    torchrun launch/train.py")
        ]
    return found


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The snippets as the package ``mine``."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "mine").mkdir()
    for name, code in snippets():
        (folder / name).write_text(code)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_no_snippet_is_longer_than_promised() -> None:
    names = [name for name, _ in snippets()]
    assert len(names) == len(set(names)) >= 6  # one snippet is one whole file, its imports included
    for name, code in snippets():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= MAX_LINES, name


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_line_of_the_docs_is_accepted(arguments: list[str]) -> None:
    groups = {folder.name: [file.stem for file in folder.glob("*.yaml")] for folder in CONF.glob("*/")}
    recipe = next(value for key, _, value in (a.partition("=") for a in arguments) if key == "+recipe")
    arguments = with_prefixes(arguments, groups)
    check_overrides(arguments, groups, RECIPES[recipe].unused)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = to_typed(compose("config", overrides=arguments))
    assert cfg.recipe == recipe


def test_the_loss_is_what_it_says(mine: None) -> None:
    config = replace(algorithm_config("grpo"), loss="mine.losses.tethered")
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    sampled = torch.tensor([-1.0, -2.5])
    inputs = LossInputs(
        logprobs=logprobs,
        entropy=torch.zeros(2),
        weights=torch.ones(2),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
        num_sequences=1,
        fields={"advantages": torch.tensor([2.0, -1.0]), "sampling_logprobs": sampled},
    )
    output = build_algorithm(config, max_tokens=8).loss(inputs)
    r = 2.718281828**0.5
    torch.testing.assert_close(output.per_token, torch.tensor([-2.0, r + (r - 1) ** 2]), rtol=1e-5, atol=1e-6)
    output.per_token.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, r + 2 * (r - 1) * r]), rtol=1e-5, atol=1e-6)


def test_the_environment_and_the_reward_give_rewards(mine: None) -> None:
    chat = Chat(tiny_tokenizer())
    config = EnvironmentConfig(
        name="mine.words.build", reward="mine.rewards.near", reward_args={"power": 1.0}, args={"size": 3}
    )
    problems = build_problems(config, chat, split="heldout", seed=0)
    assert len(problems) == 3
    engine = ScriptedEngine(lambda request: (*chat.tokens("abcd"), chat.eos_token_id))
    (group,) = collect(engine, None, problems, [0], **_options()).groups
    answer = problems._rows[0]["answer"]  # type: ignore[attr-defined]
    same = sum(1 for place in range(4) if answer[place] == "abcd"[place])
    assert 0.0 <= group.rewards[0] <= 1.0
    assert group.rewards[0] > 0.0 or same == 0
    exact = build_problems(replace(config, reward=None, reward_args={}), chat, split="heldout", seed=0)
    assert collect(engine, None, exact, [0], **_options()).groups[0].rewards == (float(answer == "abcd"),)


def test_the_environment_of_several_turns_gives_hints(mine: None) -> None:
    chat = Chat(tiny_tokenizer())
    problems = build_problems(EnvironmentConfig(name="mine.digit_problems.build"), chat, split="train", seed=0)
    guesses = iter("95")
    engine = ScriptedEngine(lambda request: (*chat.tokens(next(guesses)), chat.eos_token_id))
    (group,) = collect(engine, None, problems, [5], max_turns=4, **_options()).groups
    (rollout,) = group.rollouts
    assert (rollout.reward, rollout.num_turns) == (1.0, 2)
    assert "Lower." in chat.decode(rollout.token_ids)


class HoldingEngine(ScriptedEngine):
    """A scripted engine with slots, as far as a push looks at them."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.held: dict[AdapterRef, Mapping[str, LoraShard]] = {}

    def load_adapter(self, ref: AdapterRef, spec: LoraSpec, shards: Mapping[str, LoraShard]) -> None:
        self.held[ref] = {path: replace(shard, a=shard.a.clone(), b=shard.b.clone()) for path, shard in shards.items()}

    def read_adapter(self, ref: AdapterRef) -> Mapping[str, LoraShard]:
        return self.held[ref]

    def unload_adapter(self, ref: AdapterRef) -> None:
        del self.held[ref]


class Records(SilentTracker):
    """Keeps what is logged."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.rows: list[Mapping[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(metrics)


def test_the_recipe_learns_the_best_completion(mine: None, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, family="llama")
    device = open_device("cpu", local_rank=0)
    trainer = HfTrainer(model, device=device, dtype=torch.float32)
    chat = Chat(tiny_tokenizer())

    def answer(request: SampleRequest) -> Sequence[int]:
        text = "abcd" if request.sampling.seed is not None and request.sampling.seed % 2 else "hgfe"
        return (*chat.tokens(text), chat.eos_token_id)

    engine = HoldingEngine(answer)
    sync = WeightSync(
        trainer, engine, VersionCounter(), synchronize=lambda: None, check_lockstep=OneRank().check_lockstep
    )
    tracker = Records(tmp_path)
    base = SimpleNamespace(dtype=torch.float32, model=SimpleNamespace(source="tiny"))
    mesh = _LoneMesh()
    rt = SimpleNamespace(
        trainer=trainer,
        chat=chat,
        engine=engine,
        weight_sync=sync,
        mesh=mesh,
        tracker=tracker,
        base=base,
        run_dir=tmp_path,
        resumed=None,
    )
    cfg: RunConfig = to_typed(
        {
            "num_steps": 6,
            "environment": {"name": "mine.words.build", "args": {"size": 4}, "reward": "mine.rewards.near"},
            "optimizer": {"learning_rate": 1e-2},
            "rollout": {"prompts_per_step": 4, "group_size": 4},
            "algorithm": {"aggregation": "token_mean"},
        }
    )
    importlib.import_module("mine.best_of_n").run(cfg, rt)
    losses = [row["loss/total"] for row in tracker.rows]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    assert len(engine.held) == 1  # the last version
    assert trainer.state_dict(POLICY)["step"] == 6
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_recipe_is_chosen_by_its_dotted_path(mine: None) -> None:
    assert choose("mine.best_of_n.run").unused == ()
    assert choose("sft") is RECIPES["sft"]
    with pytest.raises(ValueError, match=r"recipe='sfft': must be one of .*'sft'"):
        choose("sfft")


class _LoneMesh(OneRank):
    """A mesh of one rank."""

    rank = 0
    dp_rank = 0
    dp_size = 1

    def global_sum(self, values: list[float]) -> list[float]:
        return values

    def agree_on_error(self, what: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def _options() -> dict[str, Any]:
    return {
        "group_size": 1,
        "sampling": SamplingParams(max_tokens=16),
        "seed": 0,
        "step": 0,
        "coordinator": OneRank(),
    }
