"""Pruning of experts, against a model whose experts are linear layers that run one after the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from seft_ds.checkpoint.verify import verify
from seft_ds.naming import is_router, naming_of_model
from seft_ds.prune import walk
from seft_ds.prune.choose import Budget
from seft_ds.prune.statistics import FEW_TOKENS
from seft_ds.prune.wanda import wanda_scores
from tests.forked import start
from tests.prune.models import WORDS, tiny_tokenizer, tokens
from tests.prune.slow import slow_obs
from tests.prune.test_walk import sort_and_zero
from tests.ranks import run_threads
from tests.tiny import dense_moe

SEQUENCES = (5, 16)  # 80 tokens, two experts each: 27 an expert on average, and some get few


class SlowExperts(nn.Module):
    """Every expert's matrices as layers of their own, under the names that the files have."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.act_fn = fused.act_fn
        for e in range(fused.num_experts):
            gate, up = fused.gate_up_proj[e].detach().chunk(2)
            expert = nn.Module()
            for name, weight in (
                ("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[e].detach()),
            ):  # fmt: skip
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data.copy_(weight)
                expert.add_module(name, layer)
            self.add_module(str(e), expert)

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(c for n, c in self.named_children() if n.isdecimal()):
            token, place = (index == e).nonzero(as_tuple=True)
            x = hidden[token]
            y = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, y * weights[token, place, None].to(y.dtype))
        return out


def unfused(model: nn.Module) -> nn.Module:
    slow = copy.deepcopy(model)
    for module in list(slow.modules()):
        if hasattr(module, "experts"):
            module.experts = SlowExperts(module.experts)
    return slow


def slow_prune(model: nn.Module, budget: Budget, sequences: torch.Tensor, method: str) -> int:
    """Block by block with whole forward passes; returns how many matrices saw too few tokens."""
    few = 0
    for index in range(model.config.num_hidden_layers):
        layers = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and f"layers.{index}." in n and not is_router(n)
        }
        inputs: dict[str, list] = {n: [] for n in layers}
        hooks = [
            m.register_forward_pre_hook(
                lambda _, args, mine=inputs[n]: mine.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            for n, m in layers.items()
        ]
        with torch.no_grad():
            for sequence in sequences:
                model(input_ids=sequence[None])
        for hook in hooks:
            hook.remove()
        for n, m in layers.items():
            x, weight = torch.cat(inputs[n]), m.weight.data
            if len(x) < FEW_TOKENS and ".experts." in n:
                few += 1
                by_row = method == "wanda"
                sort_and_zero(
                    weight if by_row else weight.view(1, -1),
                    weight.abs() if by_row else weight.abs().view(1, -1),
                    budget,
                )
            elif method == "wanda":
                sums = x.float().square().double().sum(0)
                sort_and_zero(weight, wanda_scores(weight, sums), budget)
            else:
                gram = 2 / len(x) * x.double().T @ x.double()
                weight.copy_(slow_obs(weight.double(), gram, budget)[0])
    return few


METHODS = {"wanda": walk.prune_by_wanda, "sparsegpt": walk.prune_by_sparsegpt}


@pytest.mark.parametrize(
    "kind, method",
    [("deepseek_v3", "sparsegpt"), ("qwen2_moe", "wanda"), ("deepseek_v2", "wanda")],
)
def test_experts_are_pruned_with_the_tokens_that_reach_them(kind: str, method: str) -> None:
    model, sequences, budget = dense_moe(kind).eval(), tokens(*SEQUENCES), Budget(sparsity=0.5)
    slow = unfused(model)
    few = slow_prune(slow, budget, sequences, method)
    if kind != "deepseek_v2":  # whose router sends enough tokens everywhere
        assert 0 < few < 18 * len(slow.model.layers), "some see few tokens, and some do not"
    naming = naming_of_model(model)

    def work(ranks):
        mine = copy.deepcopy(model)
        targets = METHODS[method](mine, budget, sequences, ranks)
        assert not any(is_router(n.removesuffix(".weight")) for n in targets)
        return mine.state_dict()

    (alone,) = run_threads(1, work)
    for name, expected in slow.state_dict().items():
        fused = naming.fused_name(name)
        got = alone[fused or name]
        if fused is not None:
            parts = naming.part_names(fused, got.shape[0])
            got = got.view(len(parts), -1, got.shape[-1])[parts.index(name)]
        assert torch.equal(got == 0, expected == 0), name
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for size in (2, 3, 6):
        for state in run_threads(size, work):
            assert all(torch.equal(state[n], alone[n]) for n in alone), size


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind, method, names",
    [
        ("mixtral", "wanda", ("block_sparse_moe.experts.5.w3", "block_sparse_moe.gate")),
        ("deepseek_v3", "sparsegpt", ("mlp.experts.5.up_proj", "mlp.gate")),
        ("qwen3_moe", "magnitude", ("mlp.experts.0.down_proj", "mlp.gate")),
    ],
)
def test_files_hold_every_experts_matrices(
    tmp_path: Path, kind: str, method: str, names: tuple[str, str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = dense_moe(kind)
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(9)))
    argv = [
        "--model_name_or_path",
        "dense",
        "--output_dir",
        "out",
        "--method",
        method,
        "--sparsity",
        "0.6",
    ]
    if method != "magnitude":
        argv += [
            "--calibration_file",
            "text.txt",
            "--calibration_samples",
            "4",
            "--max_length",
            "16",
        ]
    done = start("prune", argv, tmp_path, {"DS_ACCELERATOR": "cpu"}).finish(300)
    assert done.returncode == 0, done.stdout + done.stderr
    result, written = verify(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert result.ok
    expert, router = (f"model.layers.1.{name}.weight" for name in names)
    n = written[expert].numel()
    live = result.record["targets"][expert]["live"]
    assert (
        live
        == int(written[expert].count_nonzero())
        == result.record["targets"][expert]["target_live"]
    )
    if method == "wanda":
        assert written[expert].count_nonzero(dim=1).unique().numel() == 1
    else:
        assert live == n - int(0.6 * n)
    assert router not in result.record["targets"]
    few = result.record["by_magnitude"]
    assert f"{few} matrices of experts saw fewer than {FEW_TOKENS} tokens" in done.stdout
    assert (few == 0) == (method == "magnitude")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    dense = model.state_dict()
    for name, tensor in dense.items():
        if name.endswith(("gate.weight", "e_score_correction_bias", "norm.weight")):
            assert torch.equal(loaded[name], tensor), name
            assert loaded[name].dtype == tensor.dtype
    zeros = sum(int((t == 0).sum()) for n, t in loaded.items() if "experts." in n or "_proj" in n)
    assert zeros == result.total - result.live
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text())["by_magnitude"] == few
