"""A script for TRL's SFTTrainer as many have one. Two lines make it repair a pruned model: (1) and (2).

    deepspeed --num_gpus 2 examples/trl_sft.py --model_name_or_path PRUNED --dataset_name DATA.jsonl \\
        --output_dir RUN --deepspeed ds_configs/zero3.json --max_steps 100 --learning_rate 5e-3

The settings of SEFT are the "seft" block of the DeepSpeed config. RUN gets the journal and the report,
RUN/model the model. On one GPU or CPU plain `python` does as well.
"""

from __future__ import annotations

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

import seft_ds


def main() -> None:
    seft_ds.init_ranks()  # under ZeRO-3 before transformers builds its arguments
    script, args, about_model = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config()
    rows = load_dataset("json", data_files=script.dataset_name, split="train")
    model = AutoModelForCausalLM.from_pretrained(
        about_model.model_name_or_path, dtype=about_model.dtype
    )
    tokenizer = AutoTokenizer.from_pretrained(about_model.model_name_or_path)

    callback = seft_ds.SeftCallback()
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],  # (1)
    )
    trainer.train()
    callback.save_model(f"{args.output_dir}/model")  # (2) in place of trainer.save_model(...)


if __name__ == "__main__":
    main()
