#!/usr/bin/env bash
# Writes cpu.lock and gpu.lock anew from pyproject.toml. Run it after a change of the dependencies: `make lock`.
# The locks hold names and versions only, so that any index or mirror can serve them.
set -euo pipefail
cd "$(dirname "$0")/../.."

compile() { # NAME PYTHON_VERSION [OPTION...]
    .venv/bin/uv pip compile pyproject.toml --quiet --upgrade --extra "$1" --group dev --python-version "$2" \
        --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
        --output-file "launch/env/$1.lock" "${@:3}"
    echo "launch/env/$1.lock: $(wc -l <"launch/env/$1.lock") packages"
}

if [ -n "${PIP_FIND_LINKS:-}" ]; then find_torch=(--find-links "$PIP_FIND_LINKS"); else find_torch=(--torch-backend cpu); fi
# Triton (200 MB) compiles kernels for GPUs; nothing here imports it beside CPU torch.
compile cpu 3.11 "${find_torch[@]}" --excludes <(echo triton)
compile gpu 3.12
