"""A model with its structure and without its weights: what the walk over files starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def empty_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model that a folder's config.json describes, its parameters on the meta device.

    Buffers (the frequencies of rotary embeddings, scales of embeddings) are real, and on `device`. In
    evaluation mode.

    Raises:
        ValueError: a config that transformers has no causal language model for, or one of a quantised model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{folder} is no model that can be pruned ({reason})") from error
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.eval()


def read_config(folder: str | Path) -> Any:
    """The transformers config of a model folder.

    Raises:
        ValueError: transformers cannot read it, or the model is quantised.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds; all mean that the config is unusable
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"the config.json of {folder} cannot be used ({reason})") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} holds a quantised model (quantization_config in its config.json), whose weights "
            "cannot be pruned one by one; give the model in bf16 or fp32"
        )
    return config
