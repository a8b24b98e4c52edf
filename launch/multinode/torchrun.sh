#!/bin/bash
# On every node, with torchrun; no hostfile.
#   NODES=2 NODE_RANK=0 GPUS=8 MASTER_ADDR=node-0 launch/multinode/torchrun.sh \
#       --config launch/recipes/llama2_70b_2x8.yaml --model_name_or_path PRUNED --output_dir RUN
set -eu
cd "$(dirname "$0")/../.."
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" launch/finetune.py "$@" --resume auto
