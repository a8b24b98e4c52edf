from __future__ import annotations

import pytest

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
