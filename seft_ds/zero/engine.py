"""The DeepSpeed engine extension: after each optimizer step, write through, score, evolve.

`extend` (zero/extend.py) wraps one engine instance. Per optimizer step:
0. the ranks agree whether the step is taken (a loss or gradient that isn't finite: skipped and counted)
   and whether the run is to stop after it;
1. the engine steps the deltas as ordinary parameters;
2. the new values are written into the weights that the forward pass uses (only the slots change);
3. weights in their window close the step's gradient; those whose event is due change their topology;
4. the windows of the next step open.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.event import Change, join, plan
from seft_ds.errors import RunError
from seft_ds.schedule import Schedule, resolve_interval, without_effect
from seft_ds.sparse import mask
from seft_ds.sparse.kernel_costs import KernelCosts, known_costs
from seft_ds.sparse.shard import shard_range
from seft_ds.zero import optimizer_state, shards
from seft_ds.zero.attach import AttachedTarget
from seft_ds.zero.dense_model import DenseModel
from seft_ds.zero.exchanges import Exchanges
from seft_ds.zero.guard import StepGuard, describe_batches
from seft_ds.zero.invariants import check_invariants
from seft_ds.zero.slot_rates import SlotRates
from seft_ds.zero.weight_state import WeightState, finish_curvature, never_moved

_GATHER_SLOTS = 1 << 24  # slots whose deltas are gathered at a time: bounds the transient memory


class SparseEvolution:
    """SEFT on one DeepSpeed engine (`engine.seft`). Every public method is a collective."""

    def __init__(
        self,
        engine: Any,
        attached: list[AttachedTarget],
        config: SeftConfig,
        ranks: Ranks,
        fingerprints: dict[str, str] | None = None,
        dense: DenseModel | None = None,
    ):
        self.engine = engine
        self.config = config
        self.ranks = ranks
        frozen = [p for a in attached for p in (a.weight, a.position)]
        shards.never_persist(engine, frozen)
        self.states = [WeightState(a, engine, ranks) for a in attached]
        self._slot_ranges = self._learn_slot_ranges()
        self.kernel_costs = self._learn_kernel_costs()
        for state in self.states:
            state.keeps_curvature = config.weighs_by_curvature
        self.exchanges = Exchanges(self.states, dense, config.scope, ranks)
        self.rates = SlotRates(self.states, ranks, config.lr_scale == "input")
        self.step = 0  # optimizer steps taken
        self.schedule: Schedule | None = None
        self.resumed_total_steps: int | None = None  # of the run that a checkpoint continues
        self.base_fingerprints = fingerprints or {}  # of the model that the run started from
        self.guard = StepGuard(self.states, ranks)
        self.stopping = False  # the ranks agreed to stop after the step just taken
        self.over = False  # whoever sets it has taken all steps: what comes yet changes nothing
        self.stop_request: Any = None  # with an attribute `requested`, such as signals.StopRequest
        self.skipped_in_a_row = 0
        self.skipped_steps = 0
        self.last_checkpoint: Path | None = (
            None  # the newest that this run wrote or was loaded from
        )
        self.listeners: list[Callable[[dict], None]] = []  # called with each journal record
        self.n_events = 0
        self.n_exchanges = 0
        self.event_seconds = 0.0
        self.event_bytes = 0
        if config.total_steps != "auto":
            self.begin(int(config.total_steps))

    def begin(self, total_steps: int) -> None:
        """Fix the schedule, once the number of optimizer steps of the whole run is known."""
        c = self.config
        if c.total_steps not in ("auto", total_steps):
            raise ValueError(
                f'the "seft" block says total_steps {c.total_steps}, but the run takes {total_steps}; leave '
                "total_steps out, or make them equal"
            )
        if self.resumed_total_steps not in (None, total_steps):
            raise ValueError(
                f"the checkpoint's run was to take {self.resumed_total_steps} steps, this one "
                f"{total_steps}; the schedule depends on it: resume with the same number"
            )
        self.schedule = Schedule(
            total_steps=total_steps,
            interval=resolve_interval(c.interval, c.window, total_steps),
            window=c.window,
            drop_fraction=c.drop_fraction,
            stop=c.stop,
            n_targets=len(self.states),
            waves=c.in_waves,
            replace_all_first=c.start == "gradient",
            exchange=c.exchange if self.exchanges.states else 0.0,
            exchanges=c.exchanges,
        )
        slots = [n for s in self.states for n in s.target.slots_by_part]
        exchanging = bool(self.exchanges.states)
        if self.ranks.rank == 0:
            for line in without_effect(self.schedule, slots, c.scope == "global", exchanging):
                warnings.warn(line, stacklevel=2)
        self._open_windows()

    # One optimizer step, from the engine's point of view.

    def before_step(self) -> bool:
        """Whether the step is taken: agreed by one small sum over the ranks, which is also a host sync."""
        if self.schedule is None:
            raise ValueError(
                'SEFT doesn\'t know how many steps the run has: set "total_steps" in the "seft" block, or '
                "call engine.seft.begin(total_steps) before training"
            )
        wants_stop = self.stop_request is not None and self.stop_request.requested
        bad, stop = self.guard.agree(wants_stop)
        self.stopping = stop
        self.rates.before_step()
        return not bad

    def fp32_norm(self) -> float | None:
        """The gradient norm where DeepSpeed won't report it (ZeRO-0, fp32, clipping on)."""
        if self.engine.get_global_grad_norm() is None and optimizer_state.is_replicated(
            self.engine
        ):
            grads = [s.delta.grad for s in self.states if s.delta.grad is not None]
            return float(torch.stack([g.float().norm() for g in grads]).norm()) if grads else 0.0
        return None

    def after_step(self, applied: bool, fp32_norm: float | None, learning_rate: float) -> None:
        """Write through, close windows, evolve, open the next windows."""
        self.step += 1
        scale = optimizer_state.gradient_scale(self.engine, fp32_norm) if applied else None
        assert self.schedule is not None
        due = self.schedule.due(self.step)
        finish_curvature(self.states, applied, self.ranks)
        self.rates.measure(applied)
        self.rates.scale()
        deltas = self._write_through(set(due), learning_rate, applied) if applied or due else {}
        for state in self.states:
            if state.window is not None:
                state.window.discard_step() if scale is None else state.window.finish_step(scale)
        self._evolve(due, deltas)
        rate = self.schedule.exchange_rate(self.step)
        if rate is not None and (record := self.exchanges.run(rate)) is not None:
            self.n_exchanges += 1
            self._tell(kind="exchange", **record)
        self._open_windows()
        self._count_skipped(applied)
        if self.states[0].live_bits.is_cuda:
            # The next forward gathers the weights on a stream of DeepSpeed's own.
            torch.cuda.current_stream().synchronize()

    def _count_skipped(self, applied: bool) -> None:
        """Count steps that were not taken; RunError, on every rank, after too many in a row."""
        batches = self.guard.bad_batches()
        # A loss that isn't finite makes all gradients so.
        weights = [] if batches else self.guard.bad_weights()
        self.guard.reset()
        if applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        overflow = {"weights": weights} if weights else {}
        self._tell(kind="skipped", in_a_row=self.skipped_in_a_row, batches=batches, **overflow)
        limit = self.config.max_skipped_steps
        if self.skipped_in_a_row <= limit:
            return
        where = f"the last good checkpoint is {self.last_checkpoint}"
        raise RunError(
            f"the loss or its gradient was not finite at step {self.step}, {self.skipped_in_a_row} steps in "
            f"a row (max_skipped_steps is {limit}); {describe_batches(batches, weights)}. The weights are "
            f"those after step {self.step - self.skipped_in_a_row}; "
            + (where if self.last_checkpoint else "no checkpoint has been written")
            + ". Look at these rows of the data, or lower the learning rate"
        )

    def _open_windows(self) -> None:
        """Measure in the next step what has to be, and nothing else."""
        assert self.schedule is not None
        for i, state in enumerate(self.states):
            if self.schedule.in_window(i, self.step + 1):
                state.begin_window()
        weighed = self.exchanges.states if self.schedule.in_exchange_window(self.step + 1) else []
        measured = {id(s) for s in (self.states if self.rates.missing else weighed)}
        for state in self.states:
            weighs = state.keeps_curvature and state.window is not None
            state.measures = weighs or id(state) in measured
            state.begin_curvature() if state.measures else state.end_curvature()

    # Deltas into weights.

    def _learn_slot_ranges(self) -> list[list[tuple[int, int]]]:
        """Which slots [lo, hi) of each target each rank optimizes: [rank][target]. One gather."""
        mine = [(s.slot_shard.lo, s.slot_shard.hi) for s in self.states]
        return self.ranks.gather_object(mine)

    def _learn_kernel_costs(self) -> KernelCosts:
        """What the kernels of slot gradients take, as rank 0 knows or measures it: all ranks choose alike."""
        problems = [s.problem for s in self.states]
        device = self.states[0].live_bits.device
        mine = known_costs(problems, device) if self.ranks.rank == 0 else KernelCosts()
        costs: KernelCosts = self.ranks.gather_object(mine)[0]
        for state in self.states:
            state.kernel_costs = costs
        return costs

    def gather_deltas(self, targets: list[int]) -> list[torch.Tensor]:
        """The fp32 deltas (K,) of some targets, on every rank. One collective; none under ZeRO-0."""
        if optimizer_state.is_replicated(self.engine):
            return [self.states[t].slot_shard.master.float() for t in targets]
        device = self.states[0].live_bits.device
        local = [self.states[t].slot_shard.master.to(device) for t in targets]
        sizes = [[hi - lo for lo, hi in (r[t] for t in targets)] for r in self._slot_ranges]
        parts = self.ranks.gather_known(torch.cat(local), [sum(s) for s in sizes])
        pieces = [part.split(s) for part, s in zip(parts, sizes, strict=True)]
        result = []
        for i, t in enumerate(targets):
            whole = torch.empty(self.states[t].target.n_slots, dtype=torch.float32, device=device)
            for r, ranges in enumerate(self._slot_ranges):
                lo, hi = ranges[t]
                whole[lo:hi] = pieces[r][i]
            result.append(whole)
        return result

    def _buckets(self) -> list[list[int]]:
        """Targets in runs of bounded slot counts."""
        buckets: list[list[int]] = [[]]
        filled = 0
        for i, state in enumerate(self.states):
            if buckets[-1] and filled + state.target.n_slots > _GATHER_SLOTS:
                buckets.append([])
                filled = 0
            buckets[-1].append(i)
            filled += state.target.n_slots
        return buckets

    def _write_through(
        self, due: set[int], learning_rate: float, applied: bool
    ) -> dict[int, torch.Tensor]:
        """base + δ into every weight; returns the deltas of the targets whose event is due.

        applied: the step was taken, so that the deltas of fresh slots are their first update.
        """
        kept = {}
        updates: dict[str, float] = {}  # of the slots that the last event placed
        for bucket in self._buckets():
            for i, delta in zip(bucket, self.gather_deltas(bucket), strict=True):
                state = self.states[i]
                state.write_through(delta)
                if applied and (largest := state.largest_fresh_update(delta)) is not None:
                    updates[state.target.name] = largest
                if i in due:
                    kept[i] = delta
        if updates:
            self._tell(
                kind="fresh",
                largest_update=max(updates.values()),
                by_target=updates,
                learning_rate=learning_rate,
            )
        return kept

    # Topology.

    def _evolve(self, due: list[int], deltas: dict[int, torch.Tensor]) -> None:
        """Run the event of the weights that are due. A weight whose whole window was skipped waits."""
        assert self.schedule is not None
        ready = [i for i in due if (w := self.states[i].window) is not None and w.steps > 0]
        for i in set(due) - set(ready):
            self.states[i].window = None
        if not ready:
            return
        started, bytes_before = time.perf_counter(), self.ranks.bytes
        changes: dict[int, Change] = {}
        for rate, group in self._by_rate(ready).items():
            views = [self.states[i].views(deltas[i], self._event_seed(i)) for i in group]
            planned = iter(plan([v for vs in views for v in vs], rate, self.config, self.ranks))
            for i, parts in zip(group, views, strict=True):
                changes[i] = join([next(planned) for _ in parts])
        before = self._held_live(ready)
        for i, change in changes.items():
            self.states[i].apply(change)
        self._warn_of_overflow([i for i in ready if changes[i].not_finite])
        by_part, cut, before_counts, changed = self._count_after(ready, before)
        counts = [sum(parts) for parts in by_part]
        seconds, sent = time.perf_counter() - started, self.ranks.bytes - bytes_before
        self.n_events += sum(not changes[i].left_out(self.states[i].target.n_parts) for i in ready)
        self.event_seconds += seconds
        self.event_bytes += sent
        share = {"seconds": seconds / len(ready), "bytes": sent // len(ready)}
        for i, live, n_cut, moved in zip(ready, counts, cut, changed, strict=True):
            measured = {"live": live, "cut": n_cut, "changed": moved, **share}
            self._record(self.states[i], changes[i], **measured)
        self._check_counts(ready, by_part, before_counts, changes)

    def _warn_of_overflow(self, left_out: list[int]) -> None:
        if left_out and self.ranks.rank == 0:
            names = ", ".join(self.states[i].target.name for i in left_out)
            warnings.warn(
                f"step {self.step}: the gradient sums of {names} overflowed in the window; slots and live "
                "positions there stay where they are",
                stacklevel=2,
            )

    def _by_rate(self, ready: list[int]) -> dict[float, list[int]]:
        """Weights that drop the same share are decided together (a first event drops every slot)."""
        assert self.schedule is not None
        groups: dict[float, list[int]] = {}
        for i in ready:
            rate = self.schedule.rate(i, self.step)
            assert rate is not None
            if self.schedule.replace_all_first and not self.states[i].n_events:
                # No token came in its first window, or every step was skipped: this is its first event.
                rate = 1.0
            groups.setdefault(rate, []).append(i)
        return groups

    def _event_seed(self, target: int) -> int:
        """A different seed for each weight and step, and the same after a resume."""
        return self.config.seed + self.step * len(self.states) + target

    def _held_live(self, ready: list[int]) -> torch.Tensor:
        """int64 (parts,): live positions of each part of each weight among those that this rank owns."""
        return torch.cat([s.count_by_part(s.live_bits) for s in (self.states[i] for i in ready)])

    def _count_after(
        self, ready: list[int], before: torch.Tensor
    ) -> tuple[list[list[int]], list[int], list[list[int]], list[int]]:
        """Of each weight, over all ranks and by one sum: live positions by part, the moments of its fresh
        slots that 8-bit state cut, live positions before the event (before: this rank's part), and positions
        whose live bit differs from the start."""
        states = [self.states[i] for i in ready]
        live = self._held_live(ready)
        cut = torch.stack([s.cut_moments for s in states])
        if optimizer_state.is_replicated(self.engine):
            cut = cut * (self.ranks.rank == 0)  # every rank repairs every slot
        changed = torch.tensor([s.changed() for s in states], device=live.device)
        sums = self.ranks.sum_(torch.cat([live, before, cut, changed])).tolist()
        for state in states:
            state.cut_moments.zero_()
        sizes = [s.target.n_parts for s in states]
        ends = list(itertools.accumulate(sizes))
        n, weights = ends[-1], len(states)
        after, earlier = (
            [sums[lo + end - size : lo + end] for size, end in zip(sizes, ends, strict=True)]
            for lo in (0, n)
        )
        return after, sums[2 * n : 2 * n + weights], earlier, sums[2 * n + weights :]

    def _record(self, state: WeightState, change: Change, **measured: Any) -> None:
        self._tell(
            kind="event",
            target=state.target.name,
            dropped=change.dropped,
            grown=change.dropped,
            kept=change.kept,
            revived=int(change.revived.sum()),
            died=int(change.died.sum()),
            folded=int(change.folded.sum()),
            pruned=change.pruned.numel(),
            target_live=state.target.target_live,
            slots=state.target.n_slots,
            **({"idle": change.idle} if change.idle or state.target.experts else {}),
            **({"not_finite": change.not_finite} if change.not_finite else {}),
            **measured,
        )

    def _tell(self, **record: Any) -> None:
        for listener in self.listeners:
            listener({"step": self.step, **record})

    def _check_counts(
        self,
        ready: list[int],
        counts: list[list[int]],
        before: list[list[int]],
        changes: dict[int, Change],
    ) -> None:
        """Invariant B, after every event; without `adapt`, that counts moved by what the changes say."""
        moved = [
            int(c.revived.sum()) - int(c.died.sum()) - c.pruned.numel()
            for c in (changes[i] for i in ready)
        ]
        after, earlier = [sum(c) for c in counts], [sum(c) for c in before]
        assert after == [n + m for n, m in zip(earlier, moved, strict=True)], (counts, before)
        if not self.config.adapt:
            return
        if self.config.scope == "layer":
            wanted = [self.states[i].target.live_by_part for i in ready]
            assert counts == wanted, f"live counts {counts} after an event, wanted {wanted}"
        else:  # all evolve together; an exchange has moved budgets between them
            assert sum(after) == sum(earlier)

    # What others ask for.

    @property
    def lr(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def live_counts(self, targets: list[int] | None = None) -> list[int]:
        """Live positions of each target, counted from the masks of all ranks."""
        chosen = self.states if targets is None else [self.states[i] for i in targets]
        device = self.states[0].live_bits.device
        counts = torch.tensor([mask.count(s.live_bits) for s in chosen], device=device)
        return self.ranks.sum_(counts).tolist()

    def changed_positions(self) -> list[int]:
        """Positions of each part of each target whose live bit differs from the start."""
        counts = [s.count_by_part(s.live_bits ^ s.start_bits) for s in self.states]
        return self.ranks.sum_(torch.cat(counts)).tolist()

    def unreached(self) -> list[list[bool]]:
        """Of each target, which parts no gradient has reached in the whole run."""
        touched = torch.cat([s.count_by_part(s.touched_bits) for s in self.states])
        counts = iter(self.ranks.sum_(touched).tolist())
        found: list[list[bool]] = []
        for bucket in self._buckets():
            for i, delta in zip(bucket, self.gather_deltas(bucket), strict=True):
                slots = self.states[i].target.slots_by_part
                found.append(never_moved(delta, slots, list(itertools.islice(counts, len(slots)))))
        return found

    def delta_sizes(self) -> dict[str, dict[str, float]]:
        """{target: root mean square and largest |δ| of the slots that it holds now}."""
        sizes = {}
        for bucket in self._buckets():
            for i, delta in zip(bucket, self.gather_deltas(bucket), strict=True):
                if delta.numel():
                    rms, largest = delta.square().mean().sqrt(), delta.abs().max()
                    sizes[self.states[i].target.name] = {
                        "rms": float(rms),
                        "largest": float(largest),
                    }
        return sizes

    def live_bits(self, target: int) -> torch.Tensor:
        """The whole live mask of one target, packed, on the CPU of every rank."""
        state, size = self.states[target], self.ranks.size
        numel, multiple = state.target.numel, state.multiple
        ranges = [shard_range(numel, r, size, multiple) for r in range(size)]
        # Packed on the wire and on the device: whole, a fused weight's mask is large.
        packed = self.ranks.gather(state.live_bits)
        parts = [mask.unpack(p.cpu(), hi - lo) for p, (lo, hi) in zip(packed, ranges, strict=True)]
        return mask.pack(torch.cat(parts))

    def check(self) -> None:
        """Check what has to be true of every target. A collective; RuntimeError naming the weight."""
        check_invariants(self.states, self.config, self.ranks)
