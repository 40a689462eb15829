#!/usr/bin/env bash
# Train with the DeepSpeed launcher: topology only, every argument goes to recipes/train.py.
#
#   launch/deepspeed.sh experiment=qwen2.5-0.5b deepspeed=zero1 data.source=answers.jsonl output_dir=outputs/my-draft
#   HOSTFILE=hosts launch/deepspeed.sh ...                                 (several nodes)
#
# NUM_PROCESSES: processes per node; default: one per visible GPU, one without a GPU; with HOSTFILE as many as a node's slots.
# MASTER_PORT: where they meet; default: 29500. Two runs on one node need one each.
set -euo pipefail
[ -n "${HOSTFILE:-}" ] && HOSTFILE="$(realpath -e "$HOSTFILE")"  # the launcher takes one that is missing for none
cd "$(dirname "$0")/.."
if [ -n "${HOSTFILE:-}" ]; then
  topology=(--hostfile "$HOSTFILE" ${NUM_PROCESSES:+--num_gpus "$NUM_PROCESSES"})
elif [[ "${CUDA_VISIBLE_DEVICES:-}" =~ ^[0-9,]+$ ]]; then  # the launcher ignores it beside --num_gpus
  topology=(--include "localhost:$(cut -d, -f"1-${NUM_PROCESSES:-}" <<< "$CUDA_VISIBLE_DEVICES")")
else
  topology=(--num_gpus "${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}")
fi
# --no_local_rank: the launcher would add --local_rank=N, which Hydra takes for a mistake.
exec deepspeed --no_local_rank "${topology[@]}" --master_port "${MASTER_PORT:-29500}" recipes/train.py "$@"
