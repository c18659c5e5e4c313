#!/usr/bin/env bash
# Make the virtual environment: `make setup` calls this with PYTHON and VENV set. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11} venv=${VENV:-.venv}

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
        echo "setup: Python 3.11 is needed: make setup PYTHON=/path/to/python3.11" >&2
        exit 1
    }
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "setup: installing requirements/cpu.txt into $venv (about 3 GB on disk)"
# The lock is complete, so pip need not resolve; --no-deps also keeps CUDA packages out.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.txt
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    cat >&2 <<'MESSAGE'
setup: torch cannot be imported. Most likely pip found only the CUDA build, whose libraries are not installed.
       Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (pytorch.org, "Get started", Compute Platform: CPU),
       remove .venv, and run `make setup` again.
MESSAGE
    exit 1
fi
"$venv/bin/python" requirements/fix_torchvision.py
echo "setup: ready ($("$venv/bin/python" -c 'import torch, ray, vllm; print("torch", torch.__version__, "ray", ray.__version__, "vllm", vllm.__version__)' 2>/dev/null))"
