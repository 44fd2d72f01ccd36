#!/usr/bin/env bash
# Makes build/trl, the environment of grpo_step.py's other side: TRL 1.16 with the same torch, transformers and PEFT as .venv.
#   PIP_FIND_LINKS   as in launch/env/setup.sh: where the CPU build of torch is; without: PyTorch's own index
set -euo pipefail
cd "$(dirname "$0")/.."

options=(--python build/trl/bin/python)
for place in ${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}; do
    options+=(--find-links "$place")
done
[ "${#options[@]}" -gt 2 ] || options+=(--torch-backend cpu)
uv=.venv/bin/uv
[ -x build/trl/bin/python ] || "$uv" venv --quiet --python .venv/bin/python build/trl
"$uv" pip install --quiet "${options[@]}" "trl==1.16.*" $(grep -E '^(torch|transformers|peft|accelerate)==' launch/env/cpu.lock)
build/trl/bin/python -c 'import trl; print("build/trl has TRL", trl.__version__)'
