"""A model with its structure and without its weights: what the walk over files starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.model_files import ModelFiles, load_config


def empty_model(
    folder: Path, dtype: torch.dtype, device: torch.device, files: ModelFiles | None = None
) -> Any:
    """The causal language model that a folder's config.json describes, its parameters on the meta device.

    Buffers (the frequencies of rotary embeddings, scales of embeddings) are real, and on `device`. In
    evaluation mode.

    files: the folder's, by which the head is tied or not; default: what config.json says.

    Raises:
        ValueError: a config that transformers has no causal language model for.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder, files)
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
