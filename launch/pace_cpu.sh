#!/usr/bin/env bash
# AMD PACE in its own virtual environment, since it pins other versions of transformers and torch than pard_train.
#   bash launch/pace_cpu.sh             # makes .venv-pace: about 1.3 GB and 2 minutes; a second call does nothing
# Wants Python 3.10 to 3.14 (PYTHON=python3.12 chooses it), x86_64 Linux, a processor with AVX-512 and its bfloat16
# instructions (AMD Zen 4 or newer), and the CPU build of torch: where the package index at hand does not have it, set
# PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds.
set -euo pipefail

VENV=${VENV:-.venv-pace}
PYTHON=${PYTHON:-python3}
PACE=${PACE:-amd-pace==1.3.0}
TORCH=${TORCH:-torch==2.13.0+cpu}

if [ -f "$VENV/.installed" ] && [ "$(cat "$VENV/.installed")" = "$PACE $TORCH" ]; then
    echo "$VENV has $PACE"
    exit 0
fi
if [ -r /proc/cpuinfo ] && ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this processor has no AVX-512 bfloat16 instructions (avx512_bf16), which PACE needs" >&2
    exit 1
fi
"$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --upgrade pip
# First, so that no other build with gigabytes of CUDA is chosen.
"$VENV/bin/python" -m pip install --quiet "$TORCH" || {
    echo "$TORCH is not at the package index: set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds" >&2
    exit 1
}
"$VENV/bin/python" -m pip install --quiet "$PACE"
"$VENV/bin/python" -c 'import importlib.metadata, pace; print("PACE", importlib.metadata.version("amd-pace"))'
echo "$PACE $TORCH" > "$VENV/.installed"
