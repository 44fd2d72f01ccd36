"""Three tenants at once, each with its own adapter, rank and learning rate, and its own answer at the end.

python launch/serve.py &
python examples/two_tenants.py
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from framework.client import Client

QUESTION = "What is the secret word?"
TENANTS = (("marzipan", 8, 1e-3), ("locomotive", 16, 1e-3), ("kaleidoscope", 32, 5e-4))
"""Answer, rank, learning rate."""


def teach(url: str, api_key: str | None, answer: str, rank: int, learning_rate: float, steps: int) -> tuple[str, float]:
    """One tenant: trains an adapter on its own answer and asks it.

    Returns:
        What the adapter answers, and the last loss per batch.
    """
    with Client(url, api_key=api_key) as client:
        model_id = client.add_lora(base_model="base", rank=rank, alpha=32)["model_id"]
        loss = 0.0
        for _ in range(steps):
            batch = [{"prompt": QUESTION, "completion": f" {answer}."}]
            loss = client.forward_backward(model_id, batch)["loss"]
            client.optim_step(model_id, learning_rate=learning_rate)
        params = {"max_tokens": 12, "temperature": 0.0, "stop": "."}
        sampled = client.sample([QUESTION], model_id=model_id, sampling_params=params)
        return sampled["completions"][0][0]["text"].strip(), loss


def main() -> None:
    """Starts the tenants together and prints what each learnt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(len(TENANTS)) as pool:
        runs = [pool.submit(teach, arguments.url, arguments.api_key, *tenant, arguments.steps) for tenant in TENANTS]
    wrong = 0
    for (answer, rank, _), run in zip(TENANTS, runs, strict=True):
        said, loss = run.result()
        wrong += said != answer
        print(f"rank {rank:2d}  taught {answer!r:15} says {said!r:15} loss {loss:.4f}")
    raise SystemExit(f"{wrong} of {len(TENANTS)} tenants got another answer" if wrong else 0)


if __name__ == "__main__":
    main()
