from __future__ import annotations

import pytest

from seft_ds.naming import PLAIN, is_router, naming_of, separate_experts
from seft_ds.targets import Target, assign_slots, matches, total_slots


def targets() -> list[Target]:
    shapes = [(7, 11), (100, 3), (64, 64), (1, 5)]
    return [Target(f"t{i}", s, target_live=s[0] * s[1] // 2) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("total", [4, 5, 37, 500, 2001])
def test_slots_add_up_in_proportion(total: int) -> None:
    ts = targets()
    assign_slots(ts, total)
    assert sum(t.n_slots for t in ts) == total
    numel = sum(t.numel for t in ts)
    for t in ts:
        assert t.n_slots >= 1
        assert abs(t.n_slots - total * t.numel / numel) <= len(ts) - 1


def test_at_least_one_slot_each() -> None:
    ts = targets()
    assign_slots(ts, 1)
    assert [t.n_slots for t in ts] == [1, 1, 1, 1]


def test_more_slots_than_live_weights() -> None:
    with pytest.raises(ValueError, match="only .* are live; lower density"):
        assign_slots(targets(), 4000)


def test_budgets() -> None:
    ts = targets()
    assert total_slots(ts, 0.01, None) == round(0.01 * sum(t.numel for t in ts))
    assert total_slots(ts, 0.01, 55) == 55
    assert total_slots(ts, 0.01, "rank=4") == 4 * sum(sum(t.shape) for t in ts)


def test_names() -> None:
    assert matches("model.layers.3.self_attn.q_proj", ["q_proj"])
    assert matches("model.layers.3.mlp.up_proj", ["layers.3.mlp.up_proj"])
    assert not matches("model.layers.3.self_attn.q_proj", ["proj"])


def test_all_live_weights_get_a_slot_each_where_their_shares_differ() -> None:
    ts = [Target("a", (8, 8), 32), Target("b", (8, 8), 29), Target("c", (4, 4), 7)]
    assign_slots(ts, total_slots(ts, 0.01, "live"))
    assert [t.n_slots for t in ts] == [32, 29, 7]


def fused(experts: int, rows: int, columns: int, live: list[int]) -> Target:
    return Target(
        "experts.w", (experts * rows, columns), sum(live), experts=experts, part_live=live
    )


def test_every_part_of_a_fused_weight_gets_its_share_of_slots() -> None:
    target = fused(
        3, 4, 10, [20, 20, 20, 0, 5, 20]
    )  # gate and up of three experts, one of them dead
    plain = Target("plain", (4, 10), 20)
    assert (target.n_parts, target.part_numel, target.part_shape) == (6, 20, (2, 10))
    assign_slots([plain, target], 28)
    assert plain.n_slots + target.n_slots == 28 and sum(target.part_slots) == target.n_slots
    assert plain.n_slots == 8 and target.part_slots == [4, 4, 4, 0, 4, 4]
    assert plain.part_slots == [] and plain.slots_by_part == [8]
    with pytest.raises(ValueError, match=r"part 4 of experts\.w: 6 slots wanted, but only 5"):
        assign_slots([fused(3, 4, 10, [20, 20, 20, 20, 5, 20])], 36)
    assign_slots([target], sum(target.part_live))
    assert target.part_slots == target.part_live
    assert total_slots([target], 0.01, "rank=2") == 2 * 6 * (2 + 10)


def test_parts_cut_by_a_range() -> None:
    target = fused(2, 1, 6, [3, 3])
    assert target.part_ranges(0, 12) == [(0, 6), (6, 12)]
    assert target.part_ranges(4, 7) == [(4, 6), (6, 7)]
    assert target.part_ranges(8, 9) == [(8, 8), (8, 9)]
    assert target.part_ranges(12, 12) == [(12, 12), (12, 12)]
    assert (
        target.weight_name == "experts.w"
        and target.slot_name("seft_delta") == "experts.w_seft_delta"
    )


def test_names_in_files() -> None:
    naming = naming_of("mixtral")
    fused_name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = naming.part_names(fused_name, 2)
    assert parts[:2] == [
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    ]
    assert {naming.fused_name(part) for part in parts} == {fused_name}
    router = "model.layers.0.mlp.gate.weight"
    assert naming.in_model(naming.in_files(router)) == router != naming.in_files(router)
    assert naming.fused_name(naming.in_files(router)) is None
    deepseek = naming_of("deepseek_v3")
    assert (
        deepseek.part_names("a.mlp.experts.down_proj", 2)[1] == "a.mlp.experts.1.down_proj.weight"
    )
    assert deepseek.fused_name("a.mlp.shared_experts.down_proj.weight") is None
    assert naming_of("llama") is PLAIN and not PLAIN.is_fused(fused_name)
    assert is_router("a.shared_expert_gate") and not is_router("a.gate_proj")
    assert separate_experts(["a.experts.w", "a.experts.3.w1"]) == "a.experts.3.w1"
