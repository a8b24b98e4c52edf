"""The walk over blocks, against whole forward passes of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seft_ds.prune import calls as calls_of
from seft_ds.prune import statistics, walk
from seft_ds.prune.blocks import decoder_blocks
from seft_ds.prune.choose import Budget
from seft_ds.prune.wanda import wanda_scores
from tests.prune.models import KINDS, tiny_model, tokens
from tests.prune.slow import slow_obs
from tests.ranks import run_threads

PROJECTIONS = 7  # q, k, v, o, gate, up, down


def slow_wanda(model: nn.Module, budget: Budget, sequences: torch.Tensor) -> None:
    """Wanda in the paper's order, with a whole forward pass of everything for each block."""
    for index in range(model.config.num_hidden_layers):
        linears = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and f"layers.{index}." in name
        }
        sums = {
            name: torch.zeros(m.in_features, dtype=torch.float64) for name, m in linears.items()
        }
        hooks = [m.register_forward_pre_hook(adder(sums[name])) for name, m in linears.items()]
        with torch.no_grad():
            for sequence in sequences:
                model(input_ids=sequence[None])
        for hook in hooks:
            hook.remove()
        for name, m in linears.items():
            sort_and_zero(m.weight.data, wanda_scores(m.weight, sums[name]), budget)


def adder(total: torch.Tensor):
    def add(module, args) -> None:
        # In fp32 first, as the statistics are defined; the sum is in float64.
        total.add_(args[0].float().square().double().sum((0, 1)))

    return add


def sort_and_zero(weight: torch.Tensor, scores: torch.Tensor, budget: Budget) -> None:
    """Row by row and group by group, with Python's sort."""
    if budget.pattern is None:
        length, deaths = weight.shape[1], int(budget.sparsity * weight.shape[1])
    else:
        keep, length = (int(part) for part in budget.pattern.split(":"))
        deaths = length - keep
    for row, score in zip(weight, scores.tolist()):
        for lo in range(0, len(score), length):
            order = sorted(range(lo, lo + length), key=lambda j: (score[j], j))
            row[order[:deaths]] = 0.0


METHODS = {"wanda": walk.prune_by_wanda, "sparsegpt": walk.prune_by_sparsegpt}


def prune(
    model: nn.Module, budget: Budget, sequences: torch.Tensor, size: int = 1, method: str = "wanda"
) -> list[dict]:
    """Prune over `size` thread ranks; each rank's state dict. `model` itself is not touched."""

    def work(ranks):
        mine = copy.deepcopy(model)
        METHODS[method](mine, budget, sequences, ranks)
        return mine.state_dict()

    return run_threads(size, work)


@pytest.mark.parametrize(
    "kind, budget",
    [(kind, Budget(sparsity=0.5)) for kind in KINDS]
    + [(kind, Budget(pattern="2:4")) for kind in ("llama", "qwen2")],
)
def test_the_walk_equals_whole_forward_passes(kind, budget):
    model, sequences = tiny_model(kind), tokens(5, 12)
    (got,) = prune(model, budget, sequences)
    slow_wanda(model, budget, sequences)
    for name, expected in model.state_dict().items():
        assert torch.equal(got[name], expected), name


def slow_sparsegpt(model: nn.Module, budget: Budget, sequences: torch.Tensor) -> None:
    """SparseGPT with a whole forward pass of everything for each block, solved in float64."""
    for index in range(model.config.num_hidden_layers):
        linears = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and f"layers.{index}." in n
        }
        inputs: dict[str, list] = {name: [] for name in linears}
        hooks = [
            m.register_forward_pre_hook(lambda _, args, mine=inputs[n]: mine.append(args[0][0]))
            for n, m in linears.items()
        ]
        with torch.no_grad():
            for sequence in sequences:
                model(input_ids=sequence[None])
        for hook in hooks:
            hook.remove()
        for name, m in linears.items():
            x = torch.cat(inputs[name]).double()
            new, _ = slow_obs(m.weight.data.double(), 2 / len(x) * x.T @ x, budget)
            m.weight.data.copy_(new)


@pytest.mark.parametrize(
    "kind, budget",
    [
        ("llama", Budget(sparsity=0.5)),
        ("qwen2", Budget(pattern="2:4")),
        ("gemma3", Budget(sparsity=0.7)),
    ],
)
def test_the_sparsegpt_walk_equals_whole_forward_passes(kind, budget):
    model, sequences = tiny_model(kind), tokens(5, 12)
    (got,) = prune(model, budget, sequences, method="sparsegpt")
    slow_sparsegpt(model, budget, sequences)
    for name, expected in model.state_dict().items():
        assert torch.equal(got[name] == 0, expected == 0), name
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-4)


def test_later_blocks_see_the_pruned_ones():
    """The masks differ from those that the dense model's activations give: the order matters."""
    model, sequences, budget = tiny_model(), tokens(5, 12), Budget(sparsity=0.5)
    (walked,) = prune(model, budget, sequences)
    blocks = decoder_blocks(model)
    (dense_sums,) = run_threads(
        1,
        lambda ranks: dense_statistics(model, blocks, sequences, ranks),
    )
    differing = 0
    for name, sums in dense_sums.items():
        weight = model.get_parameter(f"{name}.weight").detach().clone()
        sort_and_zero(weight, wanda_scores(weight, sums), budget)
        differs = not torch.equal(weight, walked[f"{name}.weight"])
        assert not (differs and "layers.0." in name), "the first block has dense inputs either way"
        differing += differs
    assert differing > 0


@torch.no_grad()
def dense_statistics(model, blocks, sequences, ranks) -> dict[str, torch.Tensor]:
    calls = calls_of.record_calls(model, blocks, sequences)
    hidden = [calls_of.enter(model, blocks, s)[0] for s in sequences]
    found = {}
    for block, call in zip(blocks, calls):
        inputs = statistics.input_square_sums(block, call, hidden, ranks)
        found |= {name: sums for name, (sums, _) in inputs.items()}
        hidden = [call.replay(block.module, h) for h in hidden]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_ranks_gives_the_same_weights(monkeypatch, method, dtype):
    monkeypatch.setattr(statistics, "STRIP", 5)  # so that ranks share even these small matrices
    # 5 sequences: an uneven split for 2 and 4 ranks, and a rank without any for 6.
    model, sequences, budget = tiny_model(dtype=dtype), tokens(5, 12), Budget(sparsity=0.6)
    (alone,) = prune(model, budget, sequences, method=method)
    for size in (2, 4, 6):
        for state in prune(model, budget, sequences, size, method):
            for name in alone:
                assert torch.equal(state[name], alone[name]), (name, size)


def test_statistics_come_from_every_sequence():
    model, budget = tiny_model(), Budget(sparsity=0.5)
    (all_of_them,) = prune(model, budget, tokens(4, 12))
    (without_last,) = prune(model, budget, tokens(4, 12)[:3])
    assert any(not torch.equal(all_of_them[n], without_last[n]) for n in all_of_them)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_counts_and_untouched_rest(kind):
    model = tiny_model(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (targets,) = run_threads(
        1, lambda ranks: walk.prune_by_wanda(model, Budget(sparsity=0.6), tokens(3, 12), ranks)
    )
    assert len(targets) == 3 * PROJECTIONS and set(targets.values()) == {None}
    for name, tensor in model.state_dict().items():
        if name in targets:
            assert (tensor == 0).sum(dim=1).tolist() == [int(0.6 * tensor.shape[1])] * len(tensor)
            assert not torch.signbit(tensor[tensor == 0]).any()
            assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        else:
            assert torch.equal(tensor, before[name]), name
            assert "layers" not in name or "norm" in name or name.endswith("bias"), name


def test_magnitude_counts_per_weight():
    model = tiny_model()
    targets = walk.prune_by_magnitude(model, Budget(sparsity=0.35))
    assert len(targets) == 3 * PROJECTIONS
    for name in targets:
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == weight.numel() * 35 // 100
    targets = walk.prune_by_magnitude(tiny_model(), Budget(pattern="1:4"))
    assert set(targets.values()) == {"1:4"}


def test_hooks_and_mode_are_as_before():
    model = tiny_model().train()
    run_threads(
        1, lambda ranks: walk.prune_by_wanda(model, Budget(sparsity=0.5), tokens(3, 8), ranks)
    )
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_pattern_that_fits_no_weight_changes_nothing():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # 5 divides neither 16 nor 24; 16 divides 16 only, so the first weight alone would have passed.
    for pattern, name in (("2:5", "q_proj"), ("2:16", "down_proj")):
        with pytest.raises(ValueError, match=f"layers.0.*{name}.weight"):
            walk.prune_by_magnitude(model, Budget(pattern=pattern))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_blocks_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = type("Config", (), {"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="no list of 3 decoder blocks"):
        decoder_blocks(model)


def test_stacked_experts_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*experts"):
        decoder_blocks(model)


def test_arguments_that_depend_on_tokens_are_refused():
    model = tiny_model()
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def replace(module, args, kwargs):
        return args, kwargs | {"position_ids": seen[-1]}

    model.model.layers[1].register_forward_pre_hook(replace, with_kwargs=True)
    blocks = decoder_blocks(model)
    with pytest.raises(ValueError, match="block 1 arguments"), torch.no_grad():
        calls_of.record_calls(model, blocks, tokens(2, 4))
