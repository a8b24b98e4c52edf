#!/bin/bash
#SBATCH --job-name=seft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
# A rank a task, no launcher between. From the project's folder:
#   sbatch launch/multinode/slurm.sh --config launch/recipes/llama2_70b_2x8.yaml \
#       --model_name_or_path PRUNED --output_dir RUN
# 180 s before the time is up every rank gets USR1: the run stops after its step with a checkpoint and status 0,
# and is queued again. A step and a save have to fit into these seconds.
set -u
output=
for ((i = 1; i < $#; i++)); do
    if [ "${!i}" = --output_dir ]; then j=$((i + 1)); output=${!j}; fi
done
for flag in "$@"; do case $flag in --output_dir=*) output=${flag#*=};; esac; done
if [ -z "$output" ]; then echo "give --output_dir RUN" >&2; exit 2; fi
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# Since Slurm 22.05 srun takes --cpus-per-task from this variable only, no longer from the job.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
srun --kill-on-bad-exit=1 python launch/finetune.py "$@" --resume auto
status=$?
# Status 0: stopped in time, or complete, which sparsity.json tells. Any other needs a look, not a requeue.
if [ $status -eq 0 ] && [ ! -f "$output/sparsity.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
