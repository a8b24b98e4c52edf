"""A causal language model as its files have it, under any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seft_ds.checkpoint.model import model_tensors
from seft_ds.checkpoint.model_files import ModelFiles, load_config
from seft_ds.checkpoint.parts import stored_infos
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.zero import shards

_PROBED_ENTRIES = 64  # of each tensor, at both ends of what a rank holds


def load_causal_lm(
    files: ModelFiles, dtype: torch.dtype, ranks: Ranks, attention: str | None = None
) -> Any:
    """The model of a folder whose files have been compared; under ZeRO-3 partitioned while it loads.

    A collective.

    Args:
        attention: transformers' attn_implementation; None: its own choice.

    Raises:
        ValueError: an attention implementation that transformers doesn't know, or whose package isn't there;
            a tensor that came out otherwise than the files have it.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(files.folder, files)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=attention,
        )
    except ImportError as error:
        what = f"{files.folder} can't be loaded"
        if attention is not None:
            what = f"--attn_implementation {attention} is not available"
        raise ValueError(f"{what}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # transformers' own mistakes
        raise ValueError(
            f"transformers can't load {files.folder} ({type(error).__name__}: {error}); some families were "
            "not made for ZeRO-3: try ZeRO stage 2 (ds_configs/zero2.json)"
        ) from error
    restore_padding_rows(model, files, ranks)
    all_or_none(ranks, lambda: check_loaded_values(model, files, ranks))
    return model


def restore_padding_rows(model: nn.Module, files: ModelFiles, ranks: Ranks) -> None:
    """Give embeddings the padding token's row that the files have.

    Some families of transformers set it to 0 after loading (Youtu in 5.23.0).
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        shape = shards.shape_of(module.weight)
        [info] = stored_infos(files.naming, f"{prefix}.weight", shape, module.weight.dtype)
        stored = files.stored.get(info.name)
        if stored is not None:
            begin = module.padding_idx * shape[1]
            row = torch.arange(begin, begin + shape[1])
            shards.write(module.weight, row, stored.read_flat(begin, begin + shape[1]), ranks)


def check_loaded_values(model: Any, files: ModelFiles, ranks: Ranks) -> None:
    """Compare some entries of every tensor, of the part that this rank holds, with the files.

    The names have been compared before; this finds what a loader does with them under one stage and not
    under another.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    for name, tensor in model_tensors(model):
        if name in files.verbatim:
            continue
        lo, values = shards.held(tensor, ranks)  # type: ignore[arg-type]
        infos = stored_infos(files.naming, name, shards.shape_of(tensor), tensor.dtype)  # type: ignore[arg-type]
        size = torch.Size(infos[0].shape).numel()
        hi = lo + values.numel()
        for begin, end in {
            (lo, min(lo + _PROBED_ENTRIES, hi)),
            (max(hi - _PROBED_ENTRIES, lo), hi),
        }:
            if begin >= end:
                continue
            part = begin // size
            end = min(end, (part + 1) * size)
            stored = files.stored.get(infos[part].name)
            if stored is None:  # a buffer that the model makes for itself
                continue
            wanted = stored.read_flat(begin - part * size, end - part * size).to(tensor.dtype)
            came = values[begin - lo : end - lo].cpu()
            if not torch.equal(torch.nan_to_num(came), torch.nan_to_num(wanted)):
                raise ValueError(
                    f"{name} was loaded with other values than {stored.path} has under {stored.key}; this "
                    "version of transformers doesn't load the model right under this ZeRO stage: try "
                    "another stage, or the version of transformers in constraints.txt"
                )
