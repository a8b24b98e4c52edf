#!/bin/bash
# Your own pruned model and your own rows: a recipe, and three flags on top. From the project's folder:
#   MODEL=PRUNED DATA=DATA.jsonl RUN=RUN examples/own_model_and_data.sh [more flags]
# DATA.jsonl has rows of text, of messages, of prompt and completion, or of instruction, (input,) output.
set -eu
exec deepspeed --num_gpus "${GPUS:-1}" --master_port "${MASTER_PORT:-29500}" launch/finetune.py \
    --config launch/recipes/smollm2_135m_cpu.yaml --deepspeed ds_configs/zero3.json \
    --model_name_or_path "$MODEL" --train_file "$DATA" --output_dir "$RUN" "$@"
