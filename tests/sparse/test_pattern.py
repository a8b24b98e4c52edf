from __future__ import annotations

import pytest
import torch

from seft_ds.sparse import pattern
from seft_ds.targets import parse_pattern


def test_parse() -> None:
    assert parse_pattern("2:4") == (2, 4)
    for bad in ("4:2", "2-4", "0:4", "2:2", ""):
        with pytest.raises(ValueError, match="wanted N:M"):
            parse_pattern(bad)


def test_swaps_keep_every_group_and_pick_the_best() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        live = (torch.rand(6, 4, generator=g).argsort(1) < 2).view(-1)
        held = live & (torch.rand(24, generator=g) < 0.5)
        growth = torch.randint(0, 3, (24,), generator=g).float()  # ties
        sensitivity = torch.randint(0, 3, (24,), generator=g).float()
        candidate, victim = pattern.swap_candidates(growth, sensitivity, live, held, 4)
        for group in range(6):
            members = range(4 * group, 4 * group + 4)
            free = [p for p in members if live[p] and not held[p]]
            dead = [p for p in members if not live[p]]
            chosen = {p for p in members if candidate[p]}
            if not free:
                assert victim[group] == -1 and not chosen
                continue
            pays = min(free, key=lambda p: (float(sensitivity[p]), p))
            enters = min(dead, key=lambda p: (-float(growth[p]), p))
            assert victim[group] == pays % 4
            assert chosen == (set(free) - {pays}) | {enters}
