"""The openai client against this service: the base model, then an adapter, streaming.

python launch/serve.py &
python examples/openai_chat.py --model base
"""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    """Lists the models and streams one answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="tml-local")
    parser.add_argument("--model", default="base", help="base, an adapter, or adapter@version")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.api_key)
    print("models:", ", ".join(card.id for card in client.models.list()))
    stream = client.chat.completions.create(
        model=arguments.model,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=40,
        temperature=0,
        stream=True,
    )
    for event in stream:
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
