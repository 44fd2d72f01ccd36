"""Judge: a reward given by another model behind a URL that speaks OpenAI's chat completions.

Any server does: this project's own service, vLLM, a hosted one. The judge is asked for a score from 0 to 10 on its
last line. A judge that does not answer, or whose answer has no score, fails the run after a few attempts: an invented
reward would be worse.
"""

from __future__ import annotations

import os
import re
import time

import httpx

from framework.errors import ConfigError, EnvironmentFailure

INSTRUCTION = (
    "You grade an answer. First say in one or two sentences what is right and wrong about it. "
    "Then end with a line of this form: Score: <a number from 0 to 10>"
)
_SCORE = re.compile(r"score\s*:\s*\**\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


class Judge:
    """``reward(completion, question=..., answer=...)`` in [0, 1]. Safe from several threads.

    Example, in a configuration:
        reward: framework.environments.judge.Judge
        reward_args: {url: "http://localhost:8000/v1", model: Qwen/Qwen3-32B}

    Args:
        url: up to and with the version, e.g. ``https://api.openai.com/v1``.
        model: the name that the server knows.
        instruction: the judge's system message; must ask for a last line ``Score: <0 to 10>``.
        api_key_env: the environment variable with the key, where the server wants one.
        max_tokens: of the judge's answer.
        attempts: how often one completion is sent before the run fails.
        timeout_s: of one request.
        wait_s: before the second attempt; doubles each time.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        instruction: str = INSTRUCTION,
        api_key_env: str = "OPENAI_API_KEY",
        max_tokens: int = 512,
        attempts: int = 4,
        timeout_s: float = 60.0,
        wait_s: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"environment.reward_args.url={url!r}: must begin with http:// or https://")
        if attempts < 1:
            raise ConfigError(f"environment.reward_args.attempts={attempts}: must be at least 1")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._instruction = instruction
        self._max_tokens = max_tokens
        self._attempts = attempts
        self._wait_s = wait_s
        key = os.environ.get(api_key_env)
        self._client = httpx.Client(timeout=timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, completion: str, *, question: str, answer: str | None = None, **_: object) -> float:
        """Asks the judge.

        Raises:
            EnvironmentFailure: the last attempt failed; says how.
        """
        reference = "" if answer is None else f"\n\nReference answer:\n{answer}"
        asked = f"Question:\n{question}{reference}\n\nAnswer to grade:\n{completion}"
        failure = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._wait_s * 2 ** (attempt - 1))
            try:
                return self._score(asked)
            except (httpx.TransportError, _BadAnswerError) as error:
                failure = str(error) or type(error).__name__
        raise EnvironmentFailure(f"the judge {self._model} at {self._url} failed {self._attempts} times: {failure}")

    def _score(self, asked: str) -> float:
        body = {
            "model": self._model,
            "messages": [{"role": "system", "content": self._instruction}, {"role": "user", "content": asked}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        response = self._client.post(self._url, json=body)
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _BadAnswerError(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:  # another attempt would get the same answer
            raise EnvironmentFailure(
                f"the judge {self._model} at {self._url} refuses: status {response.status_code}: {response.text[:200]}"
            )
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _BadAnswerError(f"not a chat completion: {response.text[:200]}") from error
        scores = _SCORE.findall(text or "")
        if not scores or not 0.0 <= float(scores[-1]) <= 10.0:
            raise _BadAnswerError(f"no 'Score: <0 to 10>' in its answer: {(text or '')[-200:]!r}")
        return float(scores[-1]) / 10.0


class _BadAnswerError(Exception):
    """An answer that another attempt may better."""
