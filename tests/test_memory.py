"""The planner against counts made by hand, and launch/plan.py as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seft_ds.config import parse_seft
from seft_ds.memory import Setup, moment_bytes, optimizer_flats, plan, window_bytes
from seft_ds.targets import Target
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
TARGETS = [
    Target("a", (8, 12), 48, None, 10),
    Target("b", (8, 8), 32, (2, 4), 7),
    Target("c", (4, 4), 8, None, 3),
]


def owned_by_rank_zero(target: Target, ranks: int) -> int:
    """Count positions one by one."""
    length = -(-target.numel // ranks)
    groups_begun = [
        p for p in range(target.numel) if p // target.multiple * target.multiple < length
    ]
    return len(groups_begun)


@pytest.mark.parametrize("ranks", (1, 2, 3, 5))
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_parts_by_hand(stage: int, ranks: int) -> None:
    setup = Setup(stage, ranks, dtype_bytes=2, persistent_below=0)
    got = plan(TARGETS, [100, 7], setup, parse_seft({"interval": 10}), 100).device
    cut = ranks if stage == 3 else 1
    numels = [t.numel for t in TARGETS]
    assert got["weights"] == 2 * sum(-(-n // cut) for n in [*numels, 100, 7])
    assert got["positions"] == 4 * sum(-(-t.n_slots // cut) for t in TARGETS)
    assert got["masks"] == sum(3 * -(-owned_by_rank_zero(t, ranks) // 8) for t in TARGETS)
    if stage == 0:
        assert got["masters"] == 4 * 20 and got["moments"] == 8 * 20
    elif stage < 3:
        padded = next(n for n in range(20, 200) if n % (2 * ranks) == 0)
        assert got["masters"] == 4 * padded // ranks
    else:
        assert got["masters"] == 4 * sum(-(-t.n_slots // ranks) for t in TARGETS)


def test_small_parameters_are_kept_whole_beside_their_share() -> None:
    setup = Setup(3, 4, persistent_below=50)
    weights = plan(TARGETS, [100, 7], setup, parse_seft({}), 100).device["weights"]
    # Of the frozen others only the one of 7 is small; targets are never kept whole.
    assert weights == 2 * (24 + 16 + 4 + 25 + 2 + 7)


def test_offloaded_parts_are_on_the_host() -> None:
    both = Setup(3, 2, offload_optimizer=True, offload_param=True)
    result = plan(TARGETS, [100], both, parse_seft({}), 100)
    assert set(result.host) == {"weights", "deltas", "positions", "gradients", "masters", "moments"}
    assert not set(result.host) & set(result.device)
    one = plan(TARGETS, [100], Setup(3, 2, offload_optimizer=True), parse_seft({}), 100)
    assert set(one.host) == {"gradients", "masters", "moments"}


@pytest.mark.parametrize("in_backward, arriving", [(0, 94), (60, 34), (10**6, 0)])
def test_what_arrives_shares_its_place_with_what_only_backward_has(
    in_backward: int, arriving: int
) -> None:
    """279 entries of 2 bytes; backward has 4 · 96 bytes of a weight's gradient and 4 · 20 of deltas."""

    def gathered(**setup: int) -> int:
        plan_ = plan(TARGETS, [100, 3], Setup(3, 2, **setup), parse_seft({}), 100, {}, in_backward)
        return plan_.device["gathered weights"]

    assert gathered() == 558 + arriving
    # Gathered once more for backward, whatever is there arrives beside it.
    assert gathered(reuse_distance=0, prefetched=557) == 2 * 558
    assert gathered(live_parameters=278) == 2 * 278 + 558


@pytest.mark.parametrize(
    "name, bytes_a_slot",
    [("adamw_torch", 8), ("AdamW8bit", 2 * (1 + 4 / 256)), ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
     ("lion_8bit", 1 + 4 / 256), ("Lion", 4), ("ademamix_8bit", 3 * (1 + 4 / 256)),
     ("paged_adamw_8bit", 2 * (1 + 4 / 256)), ("Adagrad", 4)],
)  # fmt: skip
def test_moments_of_each_optimizer(name: str, bytes_a_slot: float) -> None:
    assert moment_bytes(256 * 100, Setup(3, 1, optimizer=name)) == 256 * 100 * bytes_a_slot


def test_small_tensors_stay_in_32_bits() -> None:
    assert moment_bytes(4095, Setup(3, 1, optimizer="AdamW8bit")) == 8 * 4095


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="adafactor"):
        moment_bytes(10, Setup(3, 1, optimizer="adafactor"))


def test_sub_groups_hold_whole_parameters() -> None:
    assert optimizer_flats([10, 10, 10, 3], Setup(3, 2, sub_group_size=8)) == [10, 7]


def test_windows_take_turns() -> None:
    same = [Target(str(i), (8, 8), 32, None, 1) for i in range(10)]
    waves = parse_seft({"interval": 10, "window": 2})
    together = parse_seft({"interval": 10, "window": 2, "waves": False})
    setup = Setup(3, 1)
    assert window_bytes(same, setup, waves, 100) == 2 * 8 * 64
    assert window_bytes(same, setup, together, 100) == 10 * 8 * 64
    none = parse_seft({"drop_fraction": 0.0})
    assert window_bytes(same, setup, none, 100) == 0


def run_plan(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    base = ["--model_name_or_path", str(tmp_path / "config.json"), "--max_length", "64"]
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/plan.py"), *base, *flags],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    config = ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]
    done = run_plan(tmp_path, *config, "--gpus_per_node", "2", "--gpu_memory_gib", "80")
    assert done.returncode == 0, done.stderr
    assert "windows" in done.stdout and "fits into 80 GiB" in done.stdout
    # The reduction buffer alone is too much; ZeRO-3 with its offload does not change that.
    small = run_plan(tmp_path, *config, "--gpu_memory_gib", "0.5", "--seft.density", "0.02")
    assert small.returncode == 1 and "does not fit into 0.5 GiB" in small.stderr
    pruning = run_plan(tmp_path, "--prune", "sparsegpt", "--calibration_samples", "8")
    assert pruning.returncode == 0 and "one block's weights" in pruning.stdout, pruning.stderr
    neither = run_plan(tmp_path)
    assert neither.returncode == 2 and "--deepspeed" in neither.stderr
    wrong = run_plan(tmp_path, *config, "--seft.densty", "0.02")
    assert wrong.returncode == 2 and "did you mean 'density'" in wrong.stderr


def test_the_table_of_configs_is_the_planners() -> None:
    from benchmarks.config_table import table

    assert table() in (ROOT / "ds_configs/README.md").read_text()


def test_an_exchange_weighs_every_position_but_those_of_patterns() -> None:
    config = parse_seft({"dense_model": "dense"})
    got = plan(TARGETS, [], Setup(3, 2), config, 100).device["exchange"]
    # The halves of a and c, and of each two sums of squares for every output and input.
    sums = 2 * 4 * (8 + 12 + 4 + 4)
    assert got == (48 + 8) * 4 + round(16 * 0.05 * 56) + 48 * 22 + sums
    assert "exchange" not in plan(TARGETS, [], Setup(3, 2), parse_seft({}), 100).device


def test_deepseek_v3_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    """671B on 16 and 32 nodes, as docs/experts.md has it."""
    from transformers import DeepseekV3Config

    DeepseekV3Config().save_pretrained(tmp_path)
    base = ["--model_name_or_path", ".", "--deepspeed", str(ROOT / "ds_configs/zero3_70b_8x8.json")]

    def planned(*flags: str) -> subprocess.CompletedProcess:
        return forked.start("plan", [*base, *flags], tmp_path, {"DS_ACCELERATOR": "cpu"}).finish(
            200
        )

    page, found = (ROOT / "docs/experts.md").read_text(), {}
    for nodes in (16, 32):
        flags = ["--nodes", str(nodes), "--gpus_per_node", "8", "--max_length", "4096"]
        done = planned(*flags, "--json", "plan.json")
        assert done.returncode == 0, done.stderr
        found[nodes] = json.loads((tmp_path / "plan.json").read_text())
        assert round(found[nodes]["parameters"] / 1e9) == 671
    probed = planned("--probe", "true")
    assert probed.returncode == 2 and "those of a mixture of experts are not" in probed.stderr
    for part, size in found[16]["device"].items():
        row = re.search(rf"^\| {part}[^|]*\| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
        assert row, part
        assert row[1] == f"{size / 2**30:.2f}"
        assert row[2] == f"{found[32]['device'][part] / 2**30:.2f}"
    experts = 3 * 256 * 2048 * 7168  # of one layer, gathered whole in bf16, with its slots
    assert found[16]["device"]["gathered weights"] > 2 * experts
    share = found[16]["device"]["weights"]
    assert share == pytest.approx(2 * found[16]["parameters"] / 128, rel=0.01)
