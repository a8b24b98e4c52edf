"""Tiny random models of the families of transformers, and text for them, for `benchmarks/families.py`."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import torch
import yaml

SIZES_FILE = Path(__file__).parent / "families.yaml"
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven grey owls watch from old trees".split()
)
VOCABULARY = 128


def families() -> list[str]:
    """The model types that are tried, in order."""
    return list(_settings()["families"])


def _settings() -> dict[str, Any]:
    return yaml.safe_load(SIZES_FILE.read_text())


def config_of(kind: str) -> Any:
    """A tiny config of a model type: common sizes where its config has them, then its own."""
    from transformers import AutoConfig

    settings = _settings()
    default = AutoConfig.for_model(kind)
    known = default.to_dict().keys() | (getattr(default, "attribute_map", None) or {}).keys()
    sizes = {k: v for k, v in settings["sizes"].items() if k in known}
    own = settings["families"][kind] or {}
    sizes = {k: v for k, v in (sizes | own).items() if v != "default"}
    return AutoConfig.for_model(kind, **sizes)


def make_model(kind: str, folder: Path) -> tuple[str, int]:
    """A random dense model with a tokenizer in `folder`; its class, and how many entries its blocks'
    matrices have."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind)).float()
    with torch.no_grad():  # the usual start is so small that every token looks alike to the blocks
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.15)
            elif "bias" in name:
                p.normal_(std=0.05)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    matrices = (p for n, p in model.named_parameters() if p.dim() > 1 and re.search(r"\.\d+\.", n))
    return type(model).__name__, sum(p.numel() for p in matrices)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", "<pad>", *WORDS])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def write_texts(folder: Path) -> None:
    """folder/calibration.txt: varied lines; folder/train.txt: the same line again and again, so that the
    loss of a first step is the model's loss on that line."""
    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS, k=40)) for _ in range(40)]
    (folder / "calibration.txt").write_text("\n".join(lines) + "\n")
    (folder / "train.txt").write_text((" ".join(WORDS[:14]) + "\n") * 64)
