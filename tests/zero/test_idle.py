"""Weights that no gradient reaches, in the real engine: ZeRO 0-3, events and exchanges, on one rank and two.

`vision` is never called, as a vision tower is not on text; `gated` is, but what it gives is multiplied by 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_processes
from tests.tiny import dense_model, prune_, tiny_config
from tests.zero.test_engine import config, live_mask, tokens

STEPS = 10
UNREACHED = ["vision", "gated"]
WAYS: list[tuple[int, dict[str, Any]]] = [  # (ZeRO stage, settings)
    (0, {"scope": "layer", "prune": "taylor", "adapt": False, "pattern": "none"}),
    (2, {"start": "gradient", "prune": "curvature", "drop_fraction": 0.3}),
    (1, {"scope": "global", "waves": False, "prune": "fisher", "release": "revert"}),
    (3, {"exchange": 0.1, "exchanges": 2}),
    (2, {"exchange": 0.1, "scope": "layer", "drop_fraction": 0.3, "prune": "curvature"}),
]


def with_unreached() -> nn.Module:
    model = dense_model("llama")
    for name, rows in zip(UNREACHED, (20, 24), strict=True):
        setattr(model, name, nn.Linear(24, rows, bias=False))

    def add_gated(norm: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + 0.0 * model.gated(output)

    model.model.norm.register_forward_hook(add_gated)
    return model


def run(home: Path, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What became of one run's live positions, and what it says of itself."""
    import seft_ds
    from seft_ds.train.measuring import describe_unreached
    from seft_ds.zero import shards

    model = with_unreached()
    prune_(model)
    if "exchange" in settings:
        settings = {"dense_model": str(home / "dense"), **settings}
    settings = {"total_steps": STEPS, "stop": 1.0, **settings}
    engine = seft_ds.initialize(model=model, config=config(stage, **settings))[0]
    seft, records = engine.seft, []
    seft.listeners.append(records.append)
    targets = [s.target for s in seft.states]

    def now() -> dict[str, tuple[torch.Tensor, ...]]:
        return {
            s.target.name: (
                live_mask(seft, i, s.target.numel),
                shards.gather_whole(s.weight, seft.ranks).clone(),
                shards.gather_whole(s.position, seft.ranks).clone(),
            )
            for i, s in enumerate(seft.states)
        }

    first = now()
    for number in range(STEPS):
        ids = tokens(number)  # the same on every rank, so that the mean over them is the same
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        seft.check()
    last = now()
    for t in targets:
        same = [torch.equal(a, b) for a, b in zip(first[t.name], last[t.name], strict=True)]
        assert all(same) if t.name in UNREACHED else not same[1], (stage, settings, t.name, same)
    assert all(bool(s.rates.isfinite().all()) for s in seft.states)
    events = [r for r in records if r["kind"] == "event"]
    idle = {r["target"] for r in events if r.get("idle")}
    assert idle == (set(UNREACHED) if events else set())
    assert seft.n_events == sum(not r.get("idle") for r in events)
    revived = sum(r["revived"] for r in events)
    for r in records:
        if r["kind"] == "exchange":
            of = r["targets"]
            assert [n for n in of if of[n]["idle"]] == UNREACHED
            busy = sum(t.numel for t in targets if t.name not in UNREACHED)
            if settings.get("scope") != "layer":
                assert r["most"] == int(0.1 * busy)
            assert 0 < r["exchanged"] == sum(n["revived"] for n in of.values())
            revived += r["exchanged"]
    assert revived > 0
    unreached = seft.unreached()
    assert [t.name for t, off in zip(targets, unreached, strict=True) if off == [True]] == UNREACHED
    base, out = home / "base", home / f"{seft.ranks.size}-{stage}-{len(settings)}"
    record = seft_ds.save_model(engine, base, out)
    assert record["idle"] == sorted(f"{n}.weight" for n in UNREACHED)
    return {
        "live": {name: x[0] for name, x in last.items()},
        "line": describe_unreached(targets, unreached),
    }


def run_all(home: Path) -> list[dict[str, Any]]:
    return [run(home, *way) for way in WAYS]


@pytest.mark.timeout(300)
def test_weights_that_no_gradient_reaches_stay_as_they_are(tmp_path: Path) -> None:
    with_unreached().save_pretrained(tmp_path / "dense")
    tiny_config("llama").save_pretrained(tmp_path / "base")
    one, two = (run_processes(size, run_all, tmp_path)[0] for size in (1, 2))
    for way, a, b in zip(WAYS, one, two, strict=True):
        assert (
            a["line"]
            == b["line"]
            == (
                "no gradient reached 2 of 16 sparse weights, which stay as they were: vision, gated"
            )
        )
        for name, live in a["live"].items():
            assert torch.equal(b["live"][name], live), (way, name)
