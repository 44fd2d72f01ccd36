"""``python launch/doctor.py [--model NAME]``: what this machine can run, and what to do about what it cannot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from framework.doctor import TINY, examine


def main() -> None:
    """Prints the findings; exit code 1 when one is an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=TINY, help="hub name or folder for the probe; default: a tiny random model")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--port", type=int, default=8000, help="of the service")
    arguments = parser.parse_args()
    levels = []
    for finding in examine(arguments.model, run_dir=arguments.run_dir, port=arguments.port):
        levels.append(finding.level)
        print(
            f"{finding.level:8} {finding.what}" + (f"\n{'':8} -> {finding.advice}" if finding.advice else ""),
            flush=True,
        )
    print(f"{levels.count('error')} errors, {levels.count('warning')} warnings")
    sys.exit(1 if "error" in levels else 0)


if __name__ == "__main__":
    main()
