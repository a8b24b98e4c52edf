"""Repair a pruned model at fixed sparsity.

    deepspeed --num_gpus 2 launch/finetune.py --model_name_or_path PRUNED --train_file DATA.jsonl \\
        --output_dir RUN --deepspeed ds_configs/zero3.json --max_steps 100 --max_length 256 \\
        --per_device_train_batch_size 2 --learning_rate 5e-3 --seft.interval 20
    deepspeed launch/finetune.py --config launch/recipes/NAME.yaml --output_dir RUN \\
        --deepspeed ds_configs/zero3.json

`--method` runs what SEFT is compared with in its place: fixed, random_grow, spiel, masked_full, lora,
lora_pruned, spp, sqft (docs/baselines.md). `--trainable rank=8` gives them equally many trainable weights.

Runs the same under `deepspeed`, `torchrun` and `srun`, on GPUs or, where there are none, on the CPU. Flags
are those of transformers' TrainingArguments and TRL's SFTConfig; `--help` lists them all.
Exit status: 0; 2 for a mistake in the input; 1 for any other error, the loss of a rank among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # lm-eval imports a package that is also called `evaluate`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.signals import guard_process, set_outcome

if __name__ == "__main__":
    guard_process("stopped before it began")  # the imports take seconds

import os

from seft_ds.console import frozen_imports, prepare_device, run
from seft_ds.devices import asks_for_cpu


def main() -> None:
    set_outcome("stopped before training began; nothing was changed")
    if asks_for_cpu(sys.argv[1:]):
        os.environ["DS_ACCELERATOR"] = "cpu"
    prepare_device()
    with frozen_imports():
        from seft_ds.distributed.collectives import close_ranks, init_ranks
        from seft_ds.distributed.liveness import watch_peers

        # The ranks must have met before transformers builds its arguments: under ZeRO-3 it decides then
        # how models are loaded.
        ranks = init_ranks()
        watch_peers(ranks)
        from seft_ds.train.run import repair

    repair(sys.argv[1:], ranks)
    close_ranks()  # not after an error: the peers may not come


if __name__ == "__main__":
    sys.exit(run(main))
