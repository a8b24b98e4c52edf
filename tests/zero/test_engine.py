"""The real DeepSpeed engine on tiny models: ZeRO 0-3, 1-4 ranks, fp32 and bf16."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_processes
from tests.tiny import tiny_model

STEPS, WINDOW, INTERVAL = 30, 3, 5


def config(stage: int, bf16: bool = False, **seft) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "seft": {"interval": INTERVAL, "window": WINDOW, "density": 0.02, "total_steps": STEPS, **seft},
    }  # fmt: skip


def run(kind: str, stage: int, bf16: bool, seft: dict) -> dict:
    """One rank: 30 steps with everything checked on the way; returns what must not depend on ranks."""
    import seft_ds
    from seft_ds.zero import shards

    torch.manual_seed(0)
    model = tiny_model(kind, torch.bfloat16 if bf16 else torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pruned_logits = model(batch).logits
    engine, *_ = seft_ds.initialize(model=model, config=config(stage, bf16, **seft))
    seft = engine.seft
    records: list[dict] = []
    seft.listeners.append(records.append)
    with torch.no_grad():
        assert torch.equal(engine(batch).logits, pruned_logits), "step 0 is not the pruned model"
    targets = {s.target.name: s for s in seft.states}
    wanted = {n: int(before[n + ".weight"].count_nonzero()) for n in targets}
    losses, live_sets = [], []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(100 + step)
        ids = torch.randint(0, 128, (2, 16), generator=g)  # the same on every rank count
        loss = engine(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
        seft.check()
        live = dict(zip(targets, seft.live_counts(), strict=True))
        if seft.config.scope == "layer":
            assert live == wanted, step
        assert sum(live.values()) == sum(wanted.values()), step
        live_sets.append([seft.live_bits(i) for i in range(len(targets))])
        fresh = [r for r in records if r["kind"] == "event" and r["step"] == seft.step]
        for record in fresh:  # fresh slots survive their own event
            state = targets[record["target"]]
            at = shards.gather_whole(state.position, seft.ranks).long()
            assert at.unique().numel() == state.target.n_slots
    for name, p in model.named_parameters():  # nothing but the targets moved
        if (
            not name.endswith(("seft_delta", "seft_position"))
            and name.removesuffix(".weight") not in targets
        ):
            assert torch.equal(shards.gather_whole(p, seft.ranks), before[name]), name
    final = {n: shards.gather_whole(s.weight, seft.ranks) for n, s in targets.items()}
    return {
        "losses": losses, "live": live_sets, "final": final, "records": records,
        "positions": [shards.gather_whole(s.position, seft.ranks) for s in seft.states],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llama24"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_is_the_same_on_any_ranks(kind: str, stage: int) -> None:
    runs = [run_processes(size, run, kind, stage, False, {})[0] for size in (1, 2, 3, 4)]
    first = runs[0]
    events = [r for r in first["records"] if r["kind"] == "event"]
    assert sum(r["revived"] for r in events) > 0
    assert all(r["pruned"] + r["died"] == r["revived"] for r in events)
    for other in runs[1:]:
        assert torch.allclose(
            torch.tensor(other["losses"]), torch.tensor(first["losses"]), rtol=1e-4
        )
