"""The planner against counts made by hand, and launch/plan.py as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from seft_ds.config import SeftConfig, parse_seft
from seft_ds.memory import Setup, moment_bytes, optimizer_flats, plan, window_bytes
from seft_ds.targets import Target, assign_slots
from seft_ds.train.fitting import (
    fewest_ranks,
    largest_batch,
    operations_a_token,
    step_seconds,
    verdict,
    what_would_fit,
)
from seft_ds.train.planning import Shapes, Work, model_of_config, plan_run
from seft_ds.train.presets import PRESETS
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
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return forked.start("plan", [*base, *flags], tmp_path, env).finish(200)


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    config = ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]
    done = run_plan(tmp_path, *config, "--gpus_per_node", "2", "--gpu_memory_gib", "80")
    assert done.returncode == 0, done.stderr
    assert "windows" in done.stdout and "fits into 80 GiB" in done.stdout
    assert "fewest GPUs on which it fits, with 1 rows each: 1\n" in done.stdout
    assert "largest --per_device_train_batch_size that fits: " in done.stdout
    # The reduction buffer alone is too much; ZeRO-3 with its offload does not change that.
    small = run_plan(tmp_path, *config, "--gpu_memory_gib", "0.5", "--seft.density", "0.02")
    assert small.returncode == 1 and "does not fit into 0.5 GiB" in small.stderr
    pruning = run_plan(tmp_path, "--prune", "sparsegpt", "--calibration_samples", "8")
    assert pruning.returncode == 0 and "one block's weights" in pruning.stdout, pruning.stderr
    assert "largest --per_device_train_batch_size that fits" not in small.stdout
    both = run_plan(tmp_path, *config, "--prune", "wanda")
    assert both.returncode == 2 and "give one of --deepspeed" in both.stderr
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


def a_run() -> tuple[Shapes, Setup, Work, SeftConfig]:
    """A model of two weights whose activations grow with the batch."""
    targets = [Target(name, (4096, 4096), 8 << 20) for name in ("a", "b")]
    assign_slots(targets, 1 << 18)
    shapes = Shapes(targets, [1 << 20], 2, 4096, 11008, 4096, 32000)
    return shapes, Setup(3, 2), Work(), parse_seft({})


def test_the_largest_batch_is_the_last_that_fits() -> None:
    shapes, setup, work, config = a_run()
    memory = 16 * 2**30
    rows = largest_batch(shapes, setup, work, config, 100, memory)

    def share(n: int) -> float:
        planned = plan_run(shapes, setup, replace(work, micro_batch=n), config, 100)
        # Of what a card of 16 GiB shows; CUDA and NCCL take 1.5, and 8 % stay free.
        return (planned.device_total + 1.5 * 2**30) / (0.99 * memory)

    assert rows > 1 and share(rows) <= 0.92 < share(rows + 1)
    assert largest_batch(shapes, setup, work, config, 100, 2**30) == 0


@pytest.mark.parametrize(
    ("gib", "said"), [(9.9, "no"), (10.2, "tight"), (10.9, "tight"), (11.2, "fits")]
)
def test_a_verdict_leaves_a_margin(gib: float, said: str) -> None:
    # 8.5 GiB planned and 1.5 for CUDA and NCCL: 10 of 9.801, 10.098, 10.791 and 11.088 GiB.
    assert verdict(8.5 * 2**30, gib * 2**30) == said


def test_the_fewest_ranks_are_whole_nodes_beyond_one() -> None:
    shapes, setup, work, config = a_run()
    shapes.others = [1 << 25] * 320  # 20 GiB of weights in bf16
    small = replace(setup, live_parameters=0, reuse_distance=0, prefetched=0, reduce_bucket=1)

    def just_enough(ranks: int) -> float:
        planned = plan_run(shapes, replace(small, ranks=ranks), work, config, 100)
        return 1.0001 * (planned.device_total + 1.5 * 2**30) / 0.99 / 0.92

    for ranks in (1, 4, 8, 24):
        assert fewest_ranks(shapes, small, work, config, 100, just_enough(ranks), 8) == ranks
    assert fewest_ranks(shapes, small, work, config, 100, just_enough(12), 8) == 16
    assert fewest_ranks(shapes, small, work, config, 100, 2**30, 8) is None


def test_what_would_fit_names_a_batch_that_does() -> None:
    shapes, setup, work, config = a_run()
    memory, large = 16 * 2**30, replace(work, micro_batch=100)
    rows = largest_batch(shapes, setup, work, config, 100, memory)
    said = what_would_fit(shapes, setup, large, config, 100, memory, 8)
    assert f"it fits with --per_device_train_batch_size {rows}" in said and rows > 1


def test_operations_and_seconds_by_hand() -> None:
    shapes, _, work, _ = a_run()
    each = 2 * 4096 * 4096 + 4096 * 32000  # entries that a token passes through
    assert operations_a_token(shapes, work) == 6 * each  # forward, again, input gradient
    assert operations_a_token(shapes, replace(work, checkpointing=False)) == 4 * each
    shapes.targets[1].experts, shapes.experts_per_token = 8, 2
    routed = 1.25 * 4096 * 4096 + 4096 * 32000
    assert operations_a_token(shapes, work) == 6 * routed
    work = replace(work, micro_batch=3, micro_batches=2)
    seconds = step_seconds(shapes, work, 5e9, 1e12, 1e10)
    assert seconds == pytest.approx((6 * routed * 3 * 2048 * 2 / 1e12, 0.5))
    assert step_seconds(shapes, work, 5e9, None, None, probed=0.25) == (0.5, 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    model = model_of_config(name)
    buffers = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    counted = sum(t.numel() for t in [*model.parameters(), *buffers])
    assert counted == PRESETS[name].parameters


def test_a_name_that_is_no_preset_is_told_the_names() -> None:
    with pytest.raises(ValueError, match="llama9.*llama2-70b.*deepseek-v3"):
        model_of_config("llama9")
