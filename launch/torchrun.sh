#!/usr/bin/env bash
# Train with torchrun on this node, or on several: topology only, every argument goes to recipes/train.py.
#
#   launch/torchrun.sh experiment=qwen2.5-0.5b deepspeed=zero1 data.source=answers.jsonl output_dir=outputs/my-draft
#   NUM_NODES=2 NODE_RANK=0 MASTER=node0:29500 launch/torchrun.sh ...      (the same on node 1 with NODE_RANK=1)
#
# NUM_PROCESSES: processes per node; default: one per GPU, one without a GPU.
# MAX_RESTARTS: times that torchrun starts all processes again after one has died; training resumes; default 0.
# PROGRAM: another program that shares its work, data_scripts/regenerate.py or, on one node, data_scripts/score.py.
set -euo pipefail
cd "$(dirname "$0")/.."
nodes="${NUM_NODES:-1}"
processes="${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.accelerator.device_count()))')}"
if [ "$nodes" -gt 1 ]; then
  : "${NODE_RANK:?give the number of this node}" "${MASTER:?give HOST:PORT of node 0}"
  topology=(--nnodes "$nodes" --node_rank "$NODE_RANK" --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
else
  topology=(--standalone)
fi
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1  # passed on to the processes, which save
export TORCHELASTIC_SIGNALS_TO_HANDLE="$PET_SIGNALS_TO_HANDLE"  # the same for PyTorch before 2.13
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"  # seconds to save before it kills them
exec torchrun "${topology[@]}" --nproc_per_node "$processes" --max-restarts "${MAX_RESTARTS:-0}" "${PROGRAM:-recipes/train.py}" "$@"
