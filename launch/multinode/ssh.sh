#!/bin/bash
# On one node; the others are reached by ssh without a password, under the same paths.
#   HOSTFILE=launch/multinode/hostfile launch/multinode/ssh.sh --config launch/recipes/llama2_70b_2x8.yaml \
#       --model_name_or_path PRUNED --output_dir RUN
set -eu
cd "$(dirname "$0")/../.."
exec deepspeed --hostfile "${HOSTFILE:-launch/multinode/hostfile}" --master_port "${MASTER_PORT:-29500}" \
    launch/finetune.py "$@" --resume auto
