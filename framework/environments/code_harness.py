"""What runs in the sandbox for code.py: a program from the first line of standard input, then tests from the second.

The second line is read only after the program has run. Standard library only; it is never imported.
"""

import io
import json
import os
import sys


def main() -> None:
    """Prints ``<word> <number>`` for every test that passes."""
    read, out = sys.stdin.readline, os.dup(1)
    source = json.loads(read())["source"]
    sys.stdin = io.StringIO()  # what follows on standard input is not for the program
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "completion", "exec"), names)
    request = json.loads(read())
    for number, test in enumerate(request["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), dict(names))
        except BaseException:  # noqa: BLE001 - whatever it raises, it has failed
            continue
        os.write(out, f"{request['word']} {number}\n".encode())


main()
