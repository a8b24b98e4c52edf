"""By which score should dead weights change places with live ones? One exchange, and no training.

    python benchmarks/exchange_scores.py --model_name_or_path PRUNED --dense_model DENSE \\
        --train_file TEXT --text_file TEXT

Measures some steps of training text on the pruned model, then exchanges a share of all positions by each
score, over all weights together, within each or within each row, and prints the perplexity after each.
Scores, w being the
weight of a live position and the dense model's of a dead one:

    curvature   w² · Σ dy² · Σ x²       what the engine uses (seft_ds/sparse/curvature.py)
    fisher      w² · Q                  Q: sum of the squared gradients of the steps, a dense tensor a weight
    both        w² · √(curvature · Q)   their geometric mean
    input       w² · Σ x²               Wanda's score, squared
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from torch import nn

from benchmarks.hardware import cpu_name
from seft_ds.evaluate.perplexity import measure, read_text, windows_of
from seft_ds.sparse.curvature import Curvature, worth
from seft_ds.targets import Target
from seft_ds.zero.dense_model import DenseModel

SCORES = ("curvature", "fisher", "both", "input")
OVER = ("all weights", "each weight", "each row")


class Alone:
    """The one rank of a run of one (`seft_ds.distributed.collectives.Ranks`)."""

    rank, size, bytes = 0, 1, 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@dataclass
class Weight:
    name: str
    module: nn.Linear
    pruned: torch.Tensor  # (n,) as it was, flat
    dense: torch.Tensor  # (n,)
    curvature: Curvature
    Q: torch.Tensor  # fp32 (n,)

    @property
    def live(self) -> torch.Tensor:
        return self.pruned != 0

    def scores(self, name: str) -> torch.Tensor:
        """fp32 (n,), of the dense value where the position is dead."""
        value = torch.where(self.live, self.pruned, self.dense)
        output, input = self.curvature.output, self.curvature.input
        if name == "fisher":
            return value.float().square() * self.Q
        if name == "input":
            return worth(value, 0, torch.ones_like(output), input)
        ours = worth(value, 0, output, input)
        return ours if name == "curvature" else (ours * value.float().square() * self.Q).sqrt()


def main() -> None:
    options = parse()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = options.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weights = find_weights(model, options.dense_model)
    texts = read_text(options.train_file)
    rows = windows_of(tokenizer, texts, options.max_length, options.steps * options.batch)
    held = windows_of(tokenizer, read_text(options.text_file), 1024, options.max_windows)
    collect(model, weights, rows.split(options.batch))

    def perplexity() -> float:
        return measure(model.eval(), held, Alone()).perplexity  # type: ignore[arg-type]

    print(f"before: {perplexity():.2f}", flush=True)
    print("| score | over | " + " | ".join(f"{share:.0%}" for share in options.shares) + " |")
    print("|---|---|" + "--:|" * len(options.shares), flush=True)
    for score in SCORES:
        for over in OVER:
            found = []
            for share in options.shares:
                exchange(weights, score, share, over)
                found.append(f"{perplexity():.2f}")
            print(f"| {score} | {over} | {' | '.join(found)} |", flush=True)
    print(
        f"\n`python {' '.join(sys.argv)}`, {options.steps} steps of {options.batch} rows; {cpu_name()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%-d %B %Y')}."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model_name_or_path", "dense_model", "train_file", "text_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_windows", type=int, default=6, help="of 1024 tokens, for perplexity")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    return parser.parse_args()


def find_weights(model: Any, dense_folder: str) -> list[Weight]:
    """The pruned linear layers but the head."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    targets = [Target(n, (m.out_features, m.in_features), 0) for n, m in found.items()]
    dense = DenseModel(dense_folder, targets)
    return [
        Weight(
            t.name,
            module := found[t.name],
            module.weight.detach().flatten().clone(),
            dense.read(t.name, 0, t.numel).to(module.weight.dtype),
            Curvature(*t.shape, torch.device("cpu")),
            torch.zeros(t.numel),
        )
        for t in targets
    ]


def collect(model: Any, weights: list[Weight], steps: Iterator[torch.Tensor]) -> None:
    """Measure curvature and squared gradients, a row batch a step."""
    for weight in weights:
        _watch(weight)
    for p in model.parameters():
        p.requires_grad_(False)
    model.enable_input_require_grads()
    model.train()
    for rows in steps:
        model(input_ids=rows, labels=rows).loss.backward()
        for weight in weights:
            weight.curvature.finish_step()
    for weight in weights:
        for hooks in (weight.module._forward_hooks, weight.module._forward_pre_hooks):
            hooks.clear()


def _watch(weight: Weight) -> None:
    def after(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def take(dy: torch.Tensor) -> None:
            dy = dy.flatten(0, -2)
            weight.curvature.add(dy, x)
            weight.Q += (dy.t() @ x).flatten().float().square()

        if output.requires_grad:
            output.register_hook(take)

    weight.module.register_forward_hook(after)


def exchange(weights: list[Weight], score: str, share: float, over: str) -> None:
    """Put the pruned weights back, and then the best of the dead into the place of the worst of the live."""
    groups = [weights] if over == "all weights" else [[w] for w in weights]
    for group in groups:
        dead, live = [], []
        for w in group:
            scores, is_live = w.scores(score), w.live
            dead.append(torch.where(is_live, -1.0, scores))
            live.append(torch.where(is_live, scores, torch.inf))
        columns = group[0].module.in_features if over == "each row" else -1
        back, gone = _best(torch.cat(dead), share, columns), _best(-torch.cat(live), share, columns)
        sizes = [w.pruned.numel() for w in group]
        for w, revived, pruned in zip(group, back.split(sizes), gone.split(sizes), strict=True):
            value = torch.where(revived, w.dense, w.pruned).masked_fill_(pruned, 0.0)
            w.module.weight.data.copy_(value.view_as(w.module.weight))


def _best(scores: torch.Tensor, share: float, columns: int) -> torch.Tensor:
    """Bool (n,): the `share` with the largest scores (n,), of all or (columns > 0) of each row."""
    rows = scores.view(-1, columns) if columns > 0 else scores.unsqueeze(0)
    best = rows.topk(int(share * rows.shape[1]), dim=1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, True).flatten()


if __name__ == "__main__":
    main()
