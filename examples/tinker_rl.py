"""Reinforcement learning with the tinker SDK, unmodified, against this service: answer with as many digits as you can.

    pip install tinker==0.38.0
    python launch/serve.py &
    python examples/tinker_rl.py

Left out: a held-out set, checkpoints, more than one prompt. The reward is the share of digits among the sampled
characters, so that it can be seen to rise within a minute on a CPU.
"""

from __future__ import annotations

import argparse

import numpy as np
import tinker
from tinker import types

PROMPT = "Count: 1 2 3"
MAX_TOKENS = 16


def digit_share(text: str) -> float:
    """Between 0 and 1; empty text earns nothing."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    """A sampled sequence as importance_sampling wants it: shifted by one, nothing trained on the prompt."""
    tokens = prompt + list(sequence.tokens)
    padding = [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": padding + list(sequence.logprobs or ()),
            "advantages": padding + [advantage] * len(sequence.tokens),
        },
    )


def main() -> None:
    """Samples a group, gives each the advantage over the group's mean, steps, repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="tml-local")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--group", type=int, default=16)
    arguments = parser.parse_args()
    with tinker.ServiceClient(base_url=arguments.url, api_key=arguments.api_key) as service:
        about = tinker.RestClient(base_url=arguments.url, api_key=arguments.api_key)
        name = about.get_server_capabilities().result().supported_models[0].model_name
        training = service.create_lora_training_client(base_model=name, rank=16).result()
        tokenizer = training.get_tokenizer()
        prompt = tokenizer.encode(PROMPT)
        means = []
        for step in range(1, arguments.steps + 1):
            sampler = training.save_weights_and_get_sampling_client().result()
            group = sampler.sample(
                types.ModelInput.from_ints(prompt),
                num_samples=arguments.group,
                sampling_params=types.SamplingParams(max_tokens=MAX_TOKENS),
            ).result()
            rewards = np.array([digit_share(tokenizer.decode(list(s.tokens))) for s in group.sequences])
            means.append(rewards.mean())
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            data = [datum(prompt, s, float(a)) for s, a in zip(group.sequences, advantages, strict=True)]
            loss = training.forward_backward(data, "importance_sampling")
            training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            print(f"step {step:2d}  reward {rewards.mean():.3f}  loss {loss.result().metrics['loss:sum']:+.4f}")
    if max(means[-3:]) <= means[0]:
        raise SystemExit("the reward did not rise")


if __name__ == "__main__":
    main()
