"""A 2:4 model on 2:4 kernels: the same logits, and the time of a forward pass, beside the dense kernels.

    python benchmarks/semi_structured.py MODEL_2OF4 --tokens 2048

Needs a GPU with sparse tensor cores (compute capability 8.0 or later). **Untested**: written where there was
none. `torch.sparse.to_sparse_semi_structured` takes a bf16 or fp16 weight whose every 4 consecutive inputs
have at most 2 nonzero; the model's files stay as they are, the form is made after loading.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.verify import read_record
from seft_ds.console import run
from seft_ds.errors import RunError


def layers_of_pattern(model: nn.Module, record: dict[str, Any]) -> list[tuple[str, nn.Linear]]:
    """The linear layers that `sparsity.json` records as 2:4. ValueError if there are none."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and record["targets"].get(f"{name}.weight", {}).get("pattern") == "2:4"
    ]
    if not found:
        raise ValueError(
            f"no layer of this model is 2:4 (its record says {record.get('pattern')}); prune with "
            "launch/prune.py --pattern 2:4"
        )
    return found


def compress(layers: list[tuple[str, nn.Linear]]) -> None:
    """Each weight in the form of the sparse tensor cores, one at a time. The layers must be on a GPU."""
    for _, layer in layers:
        weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def timed(model: Any, ids: torch.Tensor, rounds: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a forward pass, and its logits."""
    logits = model(ids).logits
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        logits = model(ids).logits
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2], logits


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a 2:4 model of launch/prune.py or launch/finetune.py")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    record = read_record(Path(options.folder))
    if not torch.cuda.is_available():
        raise RunError("no GPU here; 2:4 kernels need one of compute capability 8.0 or later")
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).cuda().eval()
    layers = layers_of_pattern(model, record)
    ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), device="cuda")
    dense_seconds, dense = timed(model, ids, options.rounds)
    held = torch.cuda.memory_allocated()
    compress(layers)
    sparse_seconds, sparse = timed(model, ids, options.rounds)
    off = (sparse - dense).abs().max() / dense.abs().max()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {len(layers)} layers 2:4, "
        f"{options.tokens} tokens: dense {1e3 * dense_seconds:.2f} ms, 2:4 {1e3 * sparse_seconds:.2f} ms "
        f"(x{dense_seconds / sparse_seconds:.2f}); GiB {held / 2**30:.2f}, then "
        f"{torch.cuda.memory_allocated() / 2**30:.2f}; largest difference of a logit {off:.1e} of the largest"
    )


if __name__ == "__main__":
    sys.exit(run(main))
