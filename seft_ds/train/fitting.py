"""Does a run fit its devices, how large may it be, and how long will it take? From the planner's bytes.

What a device has to hold beyond the plan is not measured yet (no GPU was at hand): CUDA's context and NCCL's
buffers are taken as 1.5 GiB, and a device as showing 99 % of its nominal memory, as an 80 GiB card does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from seft_ds.config import SeftConfig
from seft_ds.memory import Setup
from seft_ds.train.planning import GIB, Shapes, Work, plan_run

BEYOND_PLAN_BYTES = 1.5 * GIB  # an estimate
SHOWN_SHARE = 0.99  # of a device's nominal memory
TIGHT_ABOVE = (
    0.92  # of what it shows: the allocator's fragments and a peak that is no estimate of ours
)
_LARGEST_BATCH = 1024


def needed_bytes(device_total: float) -> float:
    """Bytes that a device has to have for a plan of `device_total` bytes."""
    return device_total + BEYOND_PLAN_BYTES


def verdict(device_total: float, memory_bytes: float) -> str:
    """ "fits", "tight" or "no" for a plan of `device_total` bytes on a device of `memory_bytes`."""
    share = needed_bytes(device_total) / (SHOWN_SHARE * memory_bytes)
    return "fits" if share <= TIGHT_ABOVE else "tight" if share <= 1 else "no"


def largest_batch(
    shapes: Shapes, setup: Setup, work: Work, config: SeftConfig, steps: int, memory_bytes: float
) -> int:
    """The most rows a rank can take at a time so that the run fits; 0 if not even one does."""

    def fits(rows: int) -> bool:
        plan = plan_run(shapes, setup, replace(work, micro_batch=rows), config, steps)
        return verdict(plan.device_total, memory_bytes) == "fits"

    if not fits(1):
        return 0
    low, high = 1, 2  # `low` fits
    while high <= _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fewest_ranks(
    shapes: Shapes,
    setup: Setup,
    work: Work,
    config: SeftConfig,
    steps: int,
    memory_bytes: float,
    a_node: int,
) -> int | None:
    """The smallest number of ranks, of 1, 2, 4 ... on a node and then whole nodes, on which the run fits.

    None: not on 1,024 nodes either.
    """
    for ranks in _rank_counts(a_node):
        plan = plan_run(shapes, replace(setup, ranks=ranks), work, config, steps)
        if verdict(plan.device_total, memory_bytes) == "fits":
            return ranks
    return None


def what_would_fit(
    shapes: Shapes,
    setup: Setup,
    work: Work,
    config: SeftConfig,
    steps: int,
    memory_bytes: float,
    a_node: int,
) -> list[str]:
    """Single changes after which the run fits; if there are none, the one that brings most."""
    changes: dict[str, tuple[Setup, Work]] = {}
    rows = largest_batch(shapes, setup, work, config, steps, memory_bytes)
    if 0 < rows < work.micro_batch:
        changes[f"--per_device_train_batch_size {rows}"] = setup, replace(work, micro_batch=rows)
    if not setup.eight_bit:
        changes["--optim adamw_bnb_8bit"] = replace(setup, optimizer="adamw8bit"), work
    if setup.stage < 3:
        changes["ZeRO stage 3 (ds_configs/zero3.json)"] = replace(setup, stage=3), work
    if not setup.offload_optimizer:
        moved = replace(setup, offload_optimizer=True)
        changes['"offload_optimizer": {"device": "cpu"}'] = moved, work
    if setup.stage == 3 and not setup.offload_param:
        moved = replace(setup, offload_optimizer=True, offload_param=True)
        changes['"offload_param" and "offload_optimizer": {"device": "cpu"}'] = moved, work
    if not work.checkpointing:
        changes["--gradient_checkpointing true"] = setup, replace(work, checkpointing=True)
    if setup.stage == 3:
        fewer = replace(setup, live_parameters=min(setup.live_parameters, 100_000_000))
        changes['"stage3_max_live_parameters": 1e8'] = fewer, work
    ranks = fewest_ranks(shapes, setup, work, config, steps, memory_bytes, a_node)
    if ranks is not None and ranks > setup.ranks:
        changes[f"{ranks} GPUs"] = replace(setup, ranks=ranks), work
    needs = {c: plan_run(shapes, *to, config, steps).device_total for c, to in changes.items()}
    for wanted, said in (("fits", "it fits with"), ("tight", "it would be tight with")):
        found = [c for c, need in needs.items() if verdict(need, memory_bytes) == wanted]
        if found:
            return [f"{said} {change}" for change in found]
    best = min(needs, key=lambda change: needs[change])
    return [
        f"no single change is enough; {best} comes to {needed_bytes(needs[best]) / GIB:.1f} GiB"
    ]


def _rank_counts(a_node: int) -> Iterator[int]:
    ranks = 1
    while ranks < a_node:
        yield ranks
        ranks *= 2
    for nodes in range(1, 17):
        yield nodes * a_node
    for doublings in range(5, 11):
        yield 2**doublings * a_node


def operations_a_token(shapes: Shapes, work: Work) -> float:
    """Floating point operations of one token's forward and backward pass, a lower bound.

    Two an entry that a token passes through, in the forward pass, in backward for the input's gradient, and
    once more where blocks are recomputed. Attention's products and the slots' gradients are left out.
    """
    entries = 0.0
    for target in shapes.targets:
        share = shapes.experts_per_token / target.experts if target.experts else 1.0
        entries += target.numel * min(1.0, share)
    entries += shapes.hidden * shapes.vocabulary  # the head
    return 2 * entries * (3 if work.checkpointing else 2)


def step_seconds(
    shapes: Shapes,
    work: Work,
    sent_bytes: float,
    flops: float | None,
    bandwidth: float | None,
    probed: float | None = None,
) -> tuple[float, float]:
    """(computing, sending) seconds of one optimizer step, if neither hides behind the other.

    Args:
        sent_bytes: by a rank, in a step.
        flops: operations a second that a device sustains; None: `probed` says it, in seconds a micro-batch.
        bandwidth: bytes a second between ranks; None: sending is not counted.
    """
    if probed is not None:
        computing = probed * work.micro_batches
    else:
        tokens = work.micro_batch * work.length_tokens * work.micro_batches
        computing = 0.0 if flops is None else operations_a_token(shapes, work) * tokens / flops
    return computing, 0.0 if bandwidth is None else sent_bytes / bandwidth
