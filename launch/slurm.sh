#!/usr/bin/env bash
# Train on the nodes of a SLURM job, torchrun on each: topology only, every argument goes to recipes/train.py.
# Submit it from the project's folder, with the environment active:
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --mem 0 launch/slurm.sh experiment=qwen2.5-0.5b \
#       deepspeed=zero1 data.source=answers.jsonl output_dir=outputs/my-draft
#
# A job that SLURM starts again (preempted, a node lost, `scontrol requeue`) resumes from its newest checkpoint. Ten
# minutes before the time limit every process saves after its step, and the job goes back into the queue.
# NUM_PROCESSES and PROGRAM as in launch/torchrun.sh.
# CONTAINER: command that runs each task in a container, such as "apptainer exec --nv pard-train.sif" (--rocm for AMD).
#SBATCH --job-name=pard-train
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && set -- "$@" resume=true
export NUM_NODES="$SLURM_JOB_NUM_NODES"
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))"  # its own port, since jobs may share a node
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not inherit it
# One task that fails ends the job, which would wait for it otherwise.
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 ${CONTAINER:-} bash -c 'NODE_RANK=$SLURM_NODEID exec launch/torchrun.sh "$@"' bash "$@" &
tasks=$! is_time_up="" status=0
# Within two minutes it comes from a limit of ten minutes or less: the job would go back into the queue for ever.
trap '((EPOCHSECONDS - ${SLURM_JOB_START_TIME:-0} < 120)) || { is_time_up=yes; kill -USR1 "$tasks"; }' USR1
trap 'kill -TERM "$tasks"' TERM
while kill -0 "$tasks" 2> /dev/null; do wait "$tasks" && status=0 || status=$?; done  # a trap interrupts `wait`
[ "$status" -eq 0 ] || [ -z "$is_time_up" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
