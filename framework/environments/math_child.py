"""The process in which answers are compared by math-verify: one JSON request per line in, one JSON answer per line out.

A standalone script, started by math_answers.py. In a process of its own because sympy can run for ever on a short
expression, and math-verify's time limits are signals, which only a main thread gets.
"""

import json
import os
import resource
import sys

PARSE_LIMIT_S = 5
MEMORY_BYTES = 4 * 2**30


def main() -> None:
    """Serves until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    from math_verify import parse, verify

    answers.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        gold = parse(request["gold"], parsing_timeout=PARSE_LIMIT_S)
        if not gold:
            answers.write('{"error": "math-verify cannot read the reference answer"}\n')
            continue
        given = parse(request["completion"], parsing_timeout=PARSE_LIMIT_S)
        answers.write(json.dumps({"correct": verify(gold, given, timeout_seconds=PARSE_LIMIT_S)}) + "\n")


if __name__ == "__main__":
    main()
