#!/usr/bin/env bash
# Makes .venv from launch/env/cpu.lock or gpu.lock, with this machine's own Python. Does nothing when it is up to date.
#   HARDWARE=cpu|gpu   which lock; without it: gpu where there is an nvidia-smi, else cpu
#   PYTHON=python3.12  which interpreter; without it: the first that fits (cpu: 3.11 or 3.12, gpu: 3.12)
#   PIP_FIND_LINKS     pip's own setting: folders or pages that have the CPU build of torch; without: PyTorch's own index
set -euo pipefail
cd "$(dirname "$0")/../.."

hardware=${HARDWARE:-$(command -v nvidia-smi >/dev/null && echo gpu || echo cpu)}
case $hardware in
    cpu) versions="3.11 3.12" ;;
    gpu) versions="3.12" ;;
    *) echo "HARDWARE=$hardware: must be cpu or gpu" >&2 && exit 2 ;;
esac
lock=launch/env/$hardware.lock
stamp=$(cat "$lock" pyproject.toml launch/env/setup.sh <(pwd) | sha256sum)

exec 9>.venv.lock && flock 9 # a second `make` waits for the first
[ "$(cat .venv/.stamp 2>/dev/null)" = "$stamp" ] && exit 0

find_python() {
    for version in $versions; do
        for python in ${PYTHON:-"python$version" python3}; do
            if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
                echo "$python" && return
            fi
        done
    done
    echo "No Python ${versions// / or } found (tried ${PYTHON:-python3.x and python3}); install one or set PYTHON=/path/to/python" >&2
    return 1
}

python=$(find_python)
echo "Setting up .venv for $hardware with $("$python" --version): $(wc -l <"$lock") packages, once per lock file"
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check "$(grep '^uv==' "$lock")"
options=(--python .venv/bin/python)
if [ "$hardware" = cpu ]; then
    # torch==...+cpu is not on the general index.
    places=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
    for place in $places; do options+=(--find-links "$place"); done
    [ -n "$places" ] || options+=(--torch-backend cpu)
fi
.venv/bin/uv pip sync "${options[@]}" "$lock" 2>&1 | sed "/^ [+-] /d"
.venv/bin/uv pip install --quiet "${options[@]}" --no-deps --editable .
echo "$stamp" >.venv/.stamp
echo ".venv is ready"
