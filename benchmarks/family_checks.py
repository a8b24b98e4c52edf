"""What has to hold of a family's pruned and repaired folders, judged from files and by transformers alone.

Each check returns what is wrong, a line each; none uses the code that wrote the folders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

_LOSS_TOLERANCE = 2e-3
_AGREE = 0.995  # share of Wanda's choices that a plain reference has to share: sums are rounded otherwise


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors."""
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def folder_problems(source: Path, made: Path, *, values_stay: bool) -> list[str]:
    """`made` against the folder that it came from: names, shapes, dtypes, untouched tensors, zeros.

    values_stay: the live values of the sparse tensors are the source's (a pruner that only deletes).
    """
    before, after = tensors_of(source), tensors_of(made)
    if before.keys() != after.keys():
        lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        return [f"tensor names differ: {len(lost)} lost {lost[:2]}, {len(new)} new {new[:2]}"]
    record = json.loads((made / "sparsity.json").read_text())["targets"]
    problems = []
    for name, old in before.items():
        new = after[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            problems.append(f"{name}: {old.shape} {old.dtype} became {new.shape} {new.dtype}")
        elif name not in record:
            if not torch.equal(old, new):
                problems.append(f"{name} is no target and has changed")
        else:
            live = new != 0
            if int(live.sum()) != record[name]["live"]:
                problems.append(
                    f"{name}: {int(live.sum())} live, the record says {record[name]['live']}"
                )
            if values_stay and not torch.equal(new[live], old[live]):
                problems.append(f"{name}: live values have changed")
    return problems


def repair_problems(pruned: Path, repaired: Path) -> list[str]:
    """A repaired folder against the pruned one: counts of each target stay, few entries change, some do."""
    before, after = tensors_of(pruned), tensors_of(repaired)
    record = json.loads((repaired / "sparsity.json").read_text())
    if not record["events"]:
        return ["no event took place"]
    problems, idle = [], 0
    for name in record["targets"]:
        old, new = before[name], after[name]
        if int((old != 0).sum()) != int((new != 0).sum()):
            problems.append(f"{name}: the number of zeros has changed")
        changed = float((old != new).float().mean())
        idle += changed == 0
        if changed > 0.25:  # 5 % are slots, and some moved
            problems.append(f"{name}: {changed:.0%} of the entries have changed")
    if idle > len(record["targets"]) // 2:
        problems.append(f"{idle} of {len(record['targets'])} targets have not changed at all")
    return problems


def load_problems(folder: Path, dense: Path) -> list[str]:
    """What transformers finds missing, unexpected or mismatched in a folder, and zeros that it lost.

    The output has to be finite.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, found))[:2]}" for kind, found in info.items() if found]
    in_files = _zeros(tensors_of(folder).values()) - _zeros(tensors_of(dense).values())
    loaded = _zeros(model.parameters())
    loaded -= _zeros(AutoModelForCausalLM.from_pretrained(dense).parameters())
    if in_files != loaded:
        problems.append(f"{in_files} zeros more than the dense files, {loaded} in the loaded model")
    logits = model.eval()(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    return problems if logits.isfinite().all() else [*problems, "the output is not finite"]


def _zeros(tensors: Iterable[torch.Tensor]) -> int:
    return sum(int((t == 0).sum()) for t in tensors)


def loss_problems(pruned: Path, repaired: Path, line: str, balanced: bool) -> list[str]:
    """The first step's loss against that of the pruned model on the only line there was to train on.

    balanced: with what is added for routers that share their tokens out unevenly.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(pruned)(line + "<eos>", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(pruned).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight  # transformers may set its padding row to 0
        for name, tensor in tensors_of(pruned).items():
            if "embed" in name and tensor.shape == embedding.shape:
                embedding.copy_(tensor)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    wanted = float(nn.functional.cross_entropy(logits, ids[0, 1:]))
    wanted += _balance(model, ids) if balanced else 0.0
    journal = (repaired / "journal.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, journal) if r["kind"] == "step"]
    if not math.isclose(steps[0]["loss"], wanted, abs_tol=_LOSS_TOLERANCE):
        return [
            f"the first step's loss was {steps[0]['loss']:.4f}, the pruned model's is {wanted:.4f}"
        ]
    return []


@torch.no_grad()
def _balance(model: Any, ids: torch.Tensor) -> float:
    """What TRL adds for routers that share their tokens out unevenly, where a model counts that."""
    try:
        found = model(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
    except (AttributeError, TypeError):
        return 0.0
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
    return weight * float(found) if found is not None else 0.0


@torch.no_grad()
def wanda_problems(
    dense: Path, pruned: Path, sequences: torch.Tensor, sparsity: float
) -> list[str]:
    """The linear layers' zeros against Wanda done plainly: whole forward passes, hooks, one layer at a time.

    sequences: (n, tokens) int64, those that the pruner was given.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    goal = dict(AutoModelForCausalLM.from_pretrained(pruned).named_modules())
    problems = []
    for prefix, block in _blocks(model):
        linears = {
            f"{prefix}.{n}": m
            for n, m in block.named_modules()
            if isinstance(m, nn.Linear) and (goal[f"{prefix}.{n}"].weight == 0).float().mean() > 0.3
        }
        sums = _square_sums(model, linears, sequences)
        for name, layer in linears.items():
            score = layer.weight.abs().double() * sums[name].sqrt()
            order = score.argsort(dim=1, stable=True)[:, : math.floor(sparsity * score.shape[1])]
            dead = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order, True)
            same = float((dead == (goal[name].weight == 0)).float().mean())
            if same < _AGREE:
                problems.append(f"{name}: {same:.1%} of Wanda's choices are those of the reference")
        block.load_state_dict(goal[prefix].state_dict())
    return problems


def _square_sums(
    model: nn.Module, layers: dict[str, nn.Linear], sequences: torch.Tensor
) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(layer.in_features).double() for name, layer in layers.items()}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            sums[name] += args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for row in sequences:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def _blocks(model: Any) -> list[tuple[str, nn.Module]]:
    depth = model.config.num_hidden_layers
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return [(f"{prefix}.{i}", child) for i, child in enumerate(module)]
    return []
