"""A tiny model that has learnt something, its texts, and a pruned copy: for a grid that runs anywhere.

The language: sentences of 40 words, each of which is one of three that a fixed table allows after the two
words before it. A model of 2 blocks learns most of that in seconds; pruning 80 % of it hurts (a table by one
word would need the embeddings only); repair brings some of it back.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

SPARSITY = 0.8
STEPS = 200  # of training the dense model
_WORDS = 48
_LINE_WORDS = 40


def make_tiny(folder: Path) -> None:
    """folder/{dense,pruned,train.txt,validation.txt,test.txt}; does nothing if they are there."""
    if (folder / "pruned/sparsity.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    follows = [[rng.sample(range(2, _WORDS), 3) for _ in range(_WORDS)] for _ in range(4)]
    for name, lines in (("train", 2000), ("validation", 30), ("test", 30)):
        text = "\n".join(_sentence(rng, follows) for _ in range(lines))
        (folder / f"{name}.txt").write_text(text + "\n")
    model = _train(folder)
    _save(folder, model)


def _sentence(rng: random.Random, follows: list[list[list[int]]]) -> str:
    words = [rng.randrange(2, _WORDS), rng.randrange(2, _WORDS)]
    while len(words) < _LINE_WORDS:
        allowed = follows[words[-2] % 4][words[-1]]
        words.append(rng.choices(allowed, weights=[6, 3, 1])[0])
    return " ".join(f"w{w}" for w in words)


def _train(folder: Path) -> torch.nn.Module:
    """AdamW on 16 sentences a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WORDS, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lines = (folder / "train.txt").read_text().split("\n")[:-1]
    ids = torch.tensor([[int(w[1:]) for w in line.split()] for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = ids[torch.randint(0, len(ids), (16,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _save(folder: Path, model: torch.nn.Module) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from seft_ds.checkpoint.pruned import save_pruned

    model.save_pretrained(folder / "dense")  # type: ignore[operator]
    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder / "dense")
    targets = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            order = weight.abs().flatten().argsort()
            weight.view(-1)[order[: int(SPARSITY * weight.numel())]] = 0.0
            targets[f"{name}.weight"] = None
    about = {"method": "magnitude"}
    save_pruned(model, folder / "dense", folder / "pruned", targets, about)
