"""A loop of one's own on DeepSpeed: `seft_ds.initialize` in place of `deepspeed.initialize`.

    deepspeed --num_gpus 2 examples/deepspeed_loop.py --model_name_or_path PRUNED --train_file DATA.jsonl \\
        --output_dir REPAIRED --deepspeed ds_configs/zero3.json --max_steps 100 --learning_rate 5e-3

DATA.jsonl: rows with a "text". Rows are taken in the order of the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import seft_ds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model_name_or_path", "train_file", "output_dir", "deepspeed"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a step on each rank")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--local_rank", type=int, default=-1)
    options = parser.parse_args()

    seft_ds.init_ranks()
    rank, size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config = engine_config(options, size)
    partitioned = HfDeepSpeedConfig(
        config
    )  # while it lives, from_pretrained partitions under ZeRO-3
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.float32)
    del partitioned
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    engine, _, _, _ = seft_ds.initialize(model=model, config=config)

    texts = [json.loads(line)["text"] for line in Path(options.train_file).read_text().splitlines()]
    for step in range(options.max_steps):
        first = (step * size + rank) * options.batch_size
        chosen = [texts[i % len(texts)] for i in range(first, first + options.batch_size)]
        loss = engine(**as_tokens(chosen, tokenizer, options.max_length, engine.device)).loss
        engine.backward(loss)
        engine.step()
        deepspeed.comm.all_reduce(loss := loss.detach())
        if rank == 0:
            print(json.dumps({"step": step + 1, "loss": float(loss) / size}), flush=True)
    seft_ds.save_model(engine, options.model_name_or_path, options.output_dir)
    deepspeed.comm.destroy_process_group()


def engine_config(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """The file's config with what a Trainer would fill in for "auto"."""
    config = json.loads(Path(options.deepspeed).read_text())
    return config | {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": options.batch_size * size,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.learning_rate, "weight_decay": 0.0, "torch_adam": True},
        },
        "seft": config.get("seft", {}) | {"total_steps": options.max_steps},
    }


def as_tokens(
    texts: list[str], tokenizer: Any, length: int, device: Any
) -> dict[str, torch.Tensor]:
    """Token ids (rows, longest), each text with its end, and labels that leave the padding out."""
    rows = [tokenizer(text + tokenizer.eos_token)["input_ids"][:length] for text in texts]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: part.to(device) for name, part in batch.items()}


if __name__ == "__main__":
    main()
