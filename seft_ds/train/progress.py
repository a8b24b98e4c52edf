"""What a run shows while it trains: one bar on the first rank, and what goes to TensorBoard or W&B.

    38%|███▊      | 380/1000 [05:12<08:31] loss 2.314, 4,210 tokens/s, live 40.00%, churn 0.12%, 11.2 GiB

Where nobody watches (a file, Slurm's output) a line a log takes the place of the bar.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from seft_ds.bars import duration
from seft_ds.distributed.collectives import Ranks

_BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


class Topology:
    """Live weights and churn of each target, followed through the records of events and exchanges.

    churn: positions that came alive, as a share of the live ones. At fixed sparsity as many died.
    """

    def __init__(self, numel: dict[str, int], live: dict[str, int]):
        self._numel, self._live = numel, dict(live)
        self._revived = dict.fromkeys(numel, 0)  # since the last call of `scalars`
        self._changed: set[str] = set(
            numel
        )  # sparsity is told at first, then when it may have changed

    def note(self, record: dict[str, Any]) -> None:
        """A record of the journal."""
        if record.get("kind") == "event":
            found = {record["target"]: record}
        elif record.get("kind") == "exchange":
            found = record["targets"]
        else:
            return
        for name, counts in found.items():
            self._live[name] = int(counts["live"])
            self._revived[name] += int(counts["revived"])
            self._changed.add(name)

    @property
    def live_share(self) -> float:
        return sum(self._live.values()) / max(sum(self._numel.values()), 1)

    def scalars(self, each_weight: bool = False) -> dict[str, float]:
        """Sparsity and churn since the last call: of all weights together, and of each that changed."""
        live = max(sum(self._live.values()), 1)
        found = {
            "sparsity/all": 1 - self.live_share,
            "churn/all": sum(self._revived.values()) / live,
        }
        for name in sorted(self._changed) if each_weight else ():
            short = name.removeprefix("model.")
            found[f"sparsity/{short}"] = 1 - self._live[name] / self._numel[name]
            found[f"churn/{short}"] = self._revived[name] / max(self._live[name], 1)
        self._changed.clear()
        self._revived = dict.fromkeys(self._revived, 0)
        return found


class Progress(TrainerCallback):
    """The bar, or the lines in its place. Takes the place of transformers' own.

    Args:
        run: what keeps the journal: it knows tokens per second and the topology.
    """

    def __init__(self, run: Any):
        self.run = run
        self._bar: tqdm | None = None
        self._started = 0.0
        self._first_step = 0
        self._loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                bar_format=_BAR,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._loss = float(logs["loss"])
            text = self._vitals()
            if self._bar is not None:
                self._bar.set_postfix_str(text)
            else:
                left = duration(self._seconds_left(state))
                print(
                    f"step {state.global_step}/{state.max_steps}: {text}, {left} left", flush=True
                )
            return
        results = self.run.results_in(logs)
        if results:
            text = ", ".join(f"{name.removeprefix('eval_')} {v:.4g}" for name, v in results.items())
            self._say(f"evaluation after step {state.global_step}: {text}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def _vitals(self) -> str:
        parts = [f"loss {self._loss:.4g}"]
        if self.run.tokens_per_second:
            parts.append(f"{self.run.tokens_per_second:,.0f} tokens/s")
        if self.run.topology is not None:
            parts.append(f"live {self.run.topology.live_share:.2%}")
            parts.append(f"churn {self.run.scalars['churn/all']:.2%}")
        return ", ".join([*parts, memory()])

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        spent = time.perf_counter() - self._started
        return spent / max(done, 1) * (state.max_steps - state.global_step)


def hide_bars(ranks: Ranks) -> None:
    """No bars of libraries where they would be lines in a file, or the same on each rank."""
    if ranks.rank or not sys.stderr.isatty():
        disable_progress_bars()
        disable_progress_bar()


def peak_gib() -> float:
    """The most that this rank has used: of its GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory() -> str:
    """`peak_gib`, and what the GPU has."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{peak_gib():.1f} of {total / 2**30:.0f} GiB"
    return f"{peak_gib():.1f} GiB"
