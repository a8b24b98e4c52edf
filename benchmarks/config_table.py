"""The table of ds_configs/README.md: what each config is for, and what the planner says a GPU has to hold.

    python benchmarks/config_table.py

Nothing is measured and no weight is read: shapes come from the models' published sizes, bytes from
`seft_ds/memory.py`. A test compares the table in the README with this output.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from seft_ds.config import load_deepspeed_config, parse_seft
from seft_ds.memory import Setup
from seft_ds.train.planning import GIB, Shapes, Work, plan_run, shapes_of_model


@dataclass
class Use:
    """One row: a config, a model, machines, and how many rows a GPU works on at a time."""

    config: str
    model: str
    nodes: int
    gpus: int
    what_for: str
    rows: int = 1


CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
# hidden, MLP, layers, heads, key heads, vocabulary
MODELS = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "LLaMA-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "LLaMA-2-70B": (8192, 28672, 80, 64, 8, 32000),
}
LENGTH_TOKENS = 2048
USES = [
    Use("zero0", "SmolLM2-135M", 1, 1, "small models, and comparisons without ZeRO"),
    Use("zero1", "LLaMA-3-8B", 1, 8, "the model fits each GPU"),
    Use("zero2", "LLaMA-3-8B", 1, 8, "the same; gradients are cut up too"),
    Use("zero3", "LLaMA-3-8B", 1, 8, "the model is spread over the GPUs", 4),
    Use("zero3_8bit", "LLaMA-3-8B", 1, 2, "few GPUs: moments in 8 bits", 4),
    Use("zero3_offload", "LLaMA-3-8B", 1, 1, "one GPU: masters and moments on the host"),
    Use("zero3_offload_8bit", "LLaMA-3-8B", 1, 1, "the same, in 8 bits"),
    Use("zero3_70b_8x8", "LLaMA-2-70B", 8, 8, "70B on 8 nodes", 2),
    Use("zero3_70b_2x8", "LLaMA-2-70B", 2, 8, "70B on 2 nodes; fewer weights gathered ahead"),
]


def shapes_of(name: str, config_name: str) -> Shapes:
    """Shapes of a LLaMA-like model at half sparsity."""
    return shapes_of_model(model_of(name), parse_seft(seft_block(config_name)), 0.5)


def model_of(name: str) -> Any:
    """The model on the meta device, without weights."""
    hidden, mlp, layers, heads, key_heads, vocabulary = MODELS[name]
    tied = name.startswith("Smol")
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def seft_block(config_name: str) -> dict:
    return load_deepspeed_config(CONFIGS / f"{config_name}.json").get("seft", {})


def row(use: Use) -> str:
    settings = load_deepspeed_config(CONFIGS / f"{use.config}.json")
    shapes = shapes_of(use.model, use.config)
    setup = Setup.from_config(settings, use.nodes * use.gpus, 2, "adamw_torch", shapes.hidden)
    work = Work(use.rows, LENGTH_TOKENS, checkpointing=True)
    result = plan_run(shapes, setup, work, parse_seft(settings["seft"]))
    host = f"{use.gpus * result.host_total / GIB:.1f}" if result.host_total else "0"
    return (
        f"| `{use.config}.json` | {use.what_for} | {use.model}, {use.nodes} x {use.gpus} GPUs, "
        f"{use.rows} x {LENGTH_TOKENS} tokens | {result.device_total / GIB:.1f} | {host} |"
    )


def table() -> str:
    head = [
        "| config | for | predicted for | GiB a GPU | GiB of host memory a node |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + [row(use) for use in USES]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
