"""From a model's config to a plan of memory: what a run will hold on each rank, before any weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seft_ds.config import SeftConfig, parse_seft
from seft_ds.memory import HELD, Plan, Setup, plan, window_bytes
from seft_ds.naming import naming_of_model
from seft_ds.sparse.layers import as_target, choose_layers
from seft_ds.sparse.linear import is_slot_parameter
from seft_ds.targets import Target, assign_slots, total_slots
from seft_ds.train.presets import PRESETS, preset_config
from seft_ds.zero import shards

GIB = 1 << 30
_LOGIT_GRADIENT = 4  # bytes: fp32


@dataclass
class Shapes:
    """What a plan needs to know of a model."""

    targets: list[Target]
    others: list[int]  # entries of every other parameter
    layers: int
    hidden: int
    intermediate: int
    key_values: int  # width of all key heads together
    vocabulary: int
    experts_per_token: int = 0

    @property
    def numel(self) -> int:
        return sum(t.numel for t in self.targets) + sum(self.others)


@dataclass(frozen=True)
class Work:
    """What one rank works on in a step."""

    micro_batch: int = 1
    length_tokens: int = 2048
    checkpointing: bool = True
    micro_batches: int = 1  # gradient accumulation


def model_of_config(name: str) -> Any:
    """The model that a folder, a config.json or a preset's name describes, without any weights.

    Raises:
        ValueError: no config there, or of a model that transformers can't make.
    """
    preset = name.lower() if not Path(name).exists() and name.lower() in PRESETS else None
    try:
        settings = (
            preset_config(preset)
            if preset
            else AutoConfig.from_pretrained(Path(name), trust_remote_code=False)
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"--model_name_or_path {name}: no config of a causal language model ({reason}); give a model's "
            f"folder, its config.json, or one of {', '.join(PRESETS)}"
        ) from None


def shapes_of_model(model: Any, config: SeftConfig, sparsity: float) -> Shapes:
    """Shapes of a model on whatever device.

    Every linear layer but routers and the output head counts as pruned to `sparsity`, and every expert.

    Raises:
        ValueError: no linear layer matches the targets, one that does is not supported
            (`seft_ds.sparse.layers`), or a weight gets more slots than live entries.
    """
    chosen = choose_layers(model, naming_of_model(model), config.targets)
    broken = next((layer for layer in chosen if layer.problem is not None), None)
    if broken is not None:
        kinds = list(dict.fromkeys(c.name.rpartition(".")[2] for c in chosen if c.problem is None))
        advice = (
            f'name the other layers: "targets": {json.dumps(kinds)}' if kinds else "give another"
        )
        raise ValueError(f"{broken.name} can't be repaired: {broken.problem}; {advice}")
    if not chosen:
        raise ValueError("this model has no linear layer that could be a target")
    targets = [as_target(layer) for layer in chosen]
    for target in targets:
        _assume_live(target, sparsity)
    assign_slots(targets, total_slots(targets, config.density, config.trainable))
    ours = {id(layer.weight) for layer in chosen}
    return shapes_with(model, targets, [p.numel() for p in model.parameters() if id(p) not in ours])


def _assume_live(target: Target, sparsity: float) -> None:
    live = round((1 - sparsity) * target.part_numel)
    target.part_live = [live] * len(target.part_live)
    target.target_live = live * target.n_parts


def shapes_with(model: Any, targets: list[Target], others: list[int]) -> Shapes:
    """Shapes of a model whose targets are known; `others`: entries of each other parameter."""
    c = model.config.get_text_config()
    heads = int(getattr(c, "num_attention_heads", 1))
    head_dim = int(getattr(c, "head_dim", None) or c.hidden_size // heads)
    routed = int(c.num_experts_per_tok) if any(t.experts for t in targets) else 0
    # What a token goes through: its experts' widths together, or a dense layer's.
    dense = getattr(c, "intermediate_size", 4 * c.hidden_size)
    # Gemma 3n has one for each layer.
    dense = max(dense) if isinstance(dense, list | tuple) else int(dense)
    each = int(getattr(c, "moe_intermediate_size", None) or dense)
    shared = int(getattr(c, "n_shared_experts", None) or 0)
    latent = int(getattr(c, "qk_nope_head_dim", 0) or 0) + int(
        getattr(c, "qk_rope_head_dim", 0) or 0
    )
    return Shapes(
        targets,
        others,
        layers=int(c.num_hidden_layers),
        hidden=int(c.hidden_size),
        intermediate=max(dense, (routed + shared) * each if routed else 0),
        # Latent attention makes keys of every head.
        key_values=(latent or head_dim) * int(getattr(c, "num_key_value_heads", None) or heads),
        vocabulary=int(c.vocab_size),
        experts_per_token=routed,
    )


def plan_of_run(
    model: Any, targets: list[Target], run: Any, deepspeed: dict[str, Any], dtype: torch.dtype
) -> Plan:
    """The plan of a run that has been accepted: with the slots and patterns that it really has.

    model: with slots attached, partitioned or not. run: transformers' arguments.
    """
    ours = {t.weight_name for t in targets}
    others = [
        math.prod(shards.shape_of(p))
        for n, p in model.named_parameters()
        if n not in ours and not is_slot_parameter(n)
    ]
    shapes = shapes_with(model, targets, others)
    setup = Setup.from_config(
        deepspeed, run.world_size, dtype.itemsize, str(run.optim), shapes.hidden
    )
    work = Work(
        run.per_device_train_batch_size,
        run.max_length or 1024,
        run.gradient_checkpointing,
        run.gradient_accumulation_steps,
    )
    steps = run.max_steps if run.max_steps > 0 else 1000
    return plan_run(shapes, setup, work, parse_seft(deepspeed.get("seft", {})), steps)


def activation_bytes(shapes: Shapes, work: Work, dtype_bytes: int) -> int:
    """What the forward pass keeps for backward, at its highest: an estimate for LLaMA-like blocks.

    A block keeps its input, both norms' inputs and outputs, queries, keys and values before and after
    rotation, the attention's output, and gate, up, their product and the activation. With checkpointing
    only its input is kept, and one block at a time the rest. Experts have copies of their tokens, going in,
    coming out and weighed. Logits: bf16, fp32, and their gradient.
    """
    tokens = _tokens(work)
    block = 8 * shapes.hidden + 4 * shapes.key_values + 4 * shapes.intermediate
    block += 3 * shapes.experts_per_token * shapes.hidden
    if work.checkpointing:
        kept = shapes.layers * shapes.hidden + block
    else:
        kept = shapes.layers * block
    return tokens * (kept * dtype_bytes + shapes.vocabulary * (dtype_bytes + 4 + _LOGIT_GRADIENT))


def _tokens(work: Work) -> int:
    return work.micro_batch * work.length_tokens


def plan_run(
    shapes: Shapes, setup: Setup, work: Work, config: SeftConfig, total_steps: int = 1000
) -> Plan:
    """Bytes of every part on the rank that holds most."""
    activations = activation_bytes(shapes, work, setup.dtype_bytes)
    # This step's gradient where a window is open, 4 of 12 bytes a position. Backward forms it as it frees
    # activations; what earlier micro-batches left is there beside them.
    gradients = window_bytes(shapes.targets, setup, config, total_steps) // 2
    beside = gradients if work.micro_batches > 1 else max(0, gradients - activations)
    passing = {"activations": activations} | ({"window gradients": beside} if beside else {})
    only_backward = beside + _LOGIT_GRADIENT * _tokens(work) * shapes.vocabulary
    return plan(shapes.targets, shapes.others, setup, config, total_steps, passing, only_backward)


def table(result: Plan, ranks_per_node: int) -> str:
    """The plan as text: one line a part."""
    lines = [f"{'part':<20}{'device, GiB':>14}{'host, GiB':>12}"]
    for part in dict.fromkeys([*HELD, *result.device, *result.host]):
        device, host = result.device.get(part, 0), result.host.get(part, 0)
        mark = "" if part in HELD else "  (estimate)"
        lines.append(f"{part:<20}{device / GIB:>14.3f}{host / GIB:>12.3f}{mark}")
    lines.append(f"{'all':<20}{result.device_total / GIB:>14.3f}{result.host_total / GIB:>12.3f}")
    if result.host_total:
        a_node = ranks_per_node * result.host_total / GIB
        lines.append(f"host memory of a node with {ranks_per_node} ranks: {a_node:.3f} GiB")
    return "\n".join(lines)
