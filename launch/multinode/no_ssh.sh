#!/bin/bash
# On every node, without ssh between them; NODE_RANK is its line in the hostfile, from 0.
#   NODE_RANK=0 MASTER_ADDR=node-0 launch/multinode/no_ssh.sh --config launch/recipes/llama2_70b_2x8.yaml \
#       --model_name_or_path PRUNED --output_dir RUN
set -eu
cd "$(dirname "$0")/../.."
exec deepspeed --hostfile "${HOSTFILE:-launch/multinode/hostfile}" --no_ssh --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" launch/finetune.py "$@" --resume auto
