"""What a journal says about a run, added up: the numbers behind the page, the figures and the card.

Where a resumed run repeats a step, the later record stands, so that nothing is counted twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

# The counts of an event that add up over events.
CHURN_KEYS = ("dropped", "grown", "kept", "revived", "died", "folded", "pruned")


@dataclass
class Facts:
    """One run. Records are the journal's own; lists are in step order."""

    run: dict[str, Any] = field(default_factory=dict)  # the last start
    starts: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(
        default_factory=list
    )  # whole; their weights are in events
    memory: dict[str, Any] = field(default_factory=dict)
    deltas: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[dict[str, Any]]:
        return self.run.get("targets") or []

    @property
    def last_step(self) -> int:
        """The last step that the journal knows."""
        return max((int(s["step"]) for s in [*self.steps, *self.events]), default=0)

    def changes(self, event: str) -> str:
        """How often the topology changed, in words; "" if it never did. event: the word for an event."""
        exchanges = len({e["step"] for e in self.events if "exchange" in e})
        events = sum("exchange" not in e and not _left_out(e) for e in self.events)
        counts = [(events, event), (exchanges, "exchange")]
        return ", ".join(f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts if n)

    @property
    def event_seconds(self) -> float:
        return sum(number(e.get("seconds")) for e in self.events)

    @property
    def event_bytes(self) -> float:
        return sum(number(e.get("bytes")) for e in self.events)

    @property
    def seconds(self) -> float:
        """Wall time: what the run's end says, or its steps, if they are more (a resumed run)."""
        return max(
            number(self.end.get("seconds")), sum(number(s.get("seconds")) for s in self.steps)
        )

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) where the loss is finite."""
        return [(s["step"], float(s["loss"])) for s in self.steps if s.get("loss") is not None]

    @property
    def steps_not_finite(self) -> int:
        return sum("loss" in s and s["loss"] is None for s in self.steps)

    @property
    def is_global(self) -> bool:
        """Whether only the sum of the live counts has a target (`scope: global`)."""
        return find_key(self.run.get("config"), "scope") == "global"


def facts_of(records: Iterable[dict[str, Any]]) -> Facts:
    """Sort a journal's records by kind; of records for the same thing the last one stands."""
    facts = Facts()
    kept: dict[str, dict[tuple, dict[str, Any]]] = {
        k: {} for k in ("step", "event", "fresh", "eval", "exchange")
    }
    for record in records:
        kind = record["kind"]
        if kind == "run":
            facts.run, facts.starts, facts.end = record, facts.starts + 1, {}
            facts.memory, facts.deltas = {}, {}
        elif kind == "end":
            facts.end = record
        elif kind in ("memory", "deltas"):
            setattr(facts, kind, record)
        elif kind == "exchange" and isinstance(record.get("step"), int):
            kept["exchange"][(record["step"],)] = record
            for event in _as_events(record):
                kept["event"][record["step"], event["target"], "exchange"] = event
        elif kind in kept and isinstance(record.get("step"), int):
            key = (record["step"], str(record.get("target", "")), str(record.get("name", "")))
            kept[kind][key] = record
    for kind, name in (
        ("step", "steps"),
        ("event", "events"),
        ("fresh", "fresh"),
        ("eval", "evals"),
        ("exchange", "exchanges"),
    ):
        setattr(facts, name, [kept[kind][key] for key in sorted(kept[kind])])
    return facts


def _as_events(exchange: dict[str, Any]) -> list[dict[str, Any]]:
    """An exchange as an event of each weight that takes part, with its share of the cost."""
    targets = exchange.get("targets")
    found = targets if isinstance(targets, dict) else {}
    share = {key: number(exchange.get(key)) / max(len(found), 1) for key in ("seconds", "bytes")}
    return [
        {**counts, **share, "step": exchange["step"], "target": name, "exchange": True}
        for name, counts in found.items()
        if isinstance(counts, dict)
    ]


def _left_out(event: dict[str, Any]) -> bool:
    """Whether no part of the weight took part: no token reached it, or its sums overflowed."""
    return bool(event.get("idle") or event.get("not_finite")) and not event.get("dropped")


def live_totals(facts: Facts) -> tuple[int | None, int | None]:
    """(live, target) over all targets at the end, or after the last event of a run still going."""
    if facts.end.get("live") is not None:
        return int(facts.end["live"]), int(facts.end.get("target_live") or facts.end["live"])
    if not facts.targets:
        return None, None
    start = {bare(t["name"]): int(number(t.get("live"))) for t in facts.targets}
    now, target = dict(start), dict(start)
    for event in facts.events:
        now[bare(event["target"])] = int(number(event.get("live")))
        if "target_live" in event:  # an exchange doesn't change the sum that is wanted
            target[bare(event["target"])] = int(number(event["target_live"]))
    return sum(now.values()), sum(target.values())


def deviations(facts: Facts) -> list[tuple[int, int]]:
    """(step, live - target) after each step with events: the worst weight, or the sum if global.

    For `scope: layer` it is the deviation that is largest in size, with its sign.
    """
    by_step: dict[int, list[int]] = {}
    if facts.is_global:
        totals = {bare(t["name"]): int(number(t.get("live"))) for t in facts.targets}
        aim = sum(totals.values())
        for event in facts.events:
            totals[bare(event["target"])] = int(number(event.get("live")))
            by_step[event["step"]] = [sum(totals.values()) - aim]  # after the step's last event
    else:
        for event in facts.events:
            if "target_live" not in event:
                continue
            off = int(number(event.get("live")) - number(event.get("target_live")))
            by_step.setdefault(event["step"], []).append(off)
    return [(step, max(offs, key=abs)) for step, offs in sorted(by_step.items())]


def overlap(facts: Facts) -> list[tuple[int, float]]:
    """(step, share of the first live weights that are live now), after each step with events.

    As many positions left the mask as entered it, so of `changed` positions half were live at the start.
    """
    live = sum(number(t.get("live")) for t in facts.targets)
    if not live or not any("changed" in e for e in facts.events):
        return []
    changed: dict[str, float] = {}
    by_step: dict[int, float] = {0: 1.0}
    for event in facts.events:
        changed[bare(event["target"])] = number(event.get("changed"))
        by_step[event["step"]] = max(0.0, 1 - sum(changed.values()) / 2 / live)
    return sorted(by_step.items())


def update_sizes(facts: Facts) -> tuple[list[int], list[str], list[list[float]]]:
    """Layers, projections, and [projection][layer]: root mean square of the deltas when training ended."""
    found = facts.deltas.get("targets")
    values: dict[tuple[int, str], list[float]] = {}
    for name, sizes in found.items() if isinstance(found, dict) else ():
        layer, projection = split_name(name)
        if layer is not None and isinstance(sizes, dict):
            values.setdefault((layer, projection), []).append(number(sizes.get("rms")))
    layers = sorted({layer for layer, _ in values})
    projections = list(dict.fromkeys(projection for _, projection in values))
    means = {place: sum(v) / len(v) for place, v in values.items()}
    return layers, projections, [[means.get((x, p), 0.0) for x in layers] for p in projections]


def memory_rows(facts: Facts) -> list[tuple[str, float | None, float | None]]:
    """(part, planned bytes, measured bytes), either None where it isn't known."""
    sides = [facts.memory.get(key) for key in ("planned", "measured")]
    planned, measured = (side if isinstance(side, dict) else {} for side in sides)

    def value(side: dict[str, Any], part: str) -> float | None:
        return number(side[part]) if part in side else None

    parts = dict.fromkeys([*measured, *planned])
    return [(part, value(planned, part), value(measured, part)) for part in parts]


def per_step(events: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, sum of `key` over the step's events)."""
    sums: dict[int, float] = {}
    for event in events:
        sums[event["step"]] = sums.get(event["step"], 0.0) + number(event.get(key))
    return sorted(sums.items())


def split_name(name: str) -> tuple[int | None, str]:
    """(layer, projection) of a weight: (0, "self_attn.q_proj"); experts of one layer count as one."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", bare(name))
    if match is None:
        return None, bare(name)
    return int(match[1]), re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])


def churn(facts: Facts, key: str) -> tuple[list[int], list[str], list[list[float]]]:
    """Layers, projections, and [projection][layer]: `key` over all events in % of the live count.

    Weights outside of numbered layers are left out.
    """
    live: dict[tuple[int, str], float] = {}
    count: dict[tuple[int, str], float] = {}
    for target in facts.targets:
        layer, projection = split_name(target["name"])
        if layer is not None:
            place = (layer, projection)
            live[place] = live.get(place, 0.0) + number(target.get("live"))
    for event in facts.events:
        layer, projection = split_name(event["target"])
        if layer is not None:
            place = (layer, projection)
            count[place] = count.get(place, 0.0) + number(event.get(key))
            live.setdefault(place, number(event.get("target_live")))
    layers = sorted({layer for layer, _ in live})
    projections = list(dict.fromkeys(projection for _, projection in live))
    rows = [
        [100 * count.get((x, p), 0.0) / max(live.get((x, p), 0.0), 1.0) for x in layers]
        for p in projections
    ]
    return layers, projections, rows


def by_projection(facts: Facts) -> list[dict[str, Any]]:
    """A row per projection: tensors, weights, live, slots at the start, the churn over all events, and how
    many are live after them."""
    rows: dict[str, dict[str, Any]] = {}
    live = {bare(t["name"]): int(number(t.get("live"))) for t in facts.targets}
    empty = {"tensors": 0, "weights": 0, "live": 0, "slots": 0, "events": 0, "live_after": 0}
    empty |= dict.fromkeys(CHURN_KEYS, 0)
    for target in facts.targets:
        name = split_name(target["name"])[1]
        row = rows.setdefault(name, {"projection": name, **empty})
        weights = 1
        for size in target.get("shape") or [0]:
            weights *= size
        row["tensors"] += 1
        row["weights"] += weights
        row["live"] += int(number(target.get("live")))
        row["slots"] += int(number(target.get("slots")))
    for event in facts.events:
        name = split_name(event["target"])[1]
        row = rows.setdefault(name, {"projection": name, **empty})
        row["events"] += not _left_out(event)
        live[bare(event["target"])] = int(number(event.get("live")))
        for key in CHURN_KEYS:
            row[key] += int(number(event.get(key)))
    for name, count in live.items():
        rows[split_name(name)[1]]["live_after"] += count
    return list(rows.values())


def total_weights(facts: Facts) -> int:
    return sum(row["weights"] for row in by_projection(facts))


def eval_points(facts: Facts) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} of the finite evaluation values."""
    out: dict[str, list[tuple[int, float]]] = {}
    for record in facts.evals:
        if record.get("value") is not None:
            point = (record["step"], number(record["value"]))
            out.setdefault(str(record.get("name")), []).append(point)
    return out


def base_name(model: str) -> str:
    """A hub name as it is; of a path only the last part, as paths mean nothing elsewhere."""
    is_path = model.count("/") > 1 or model.startswith(("/", ".", "~")) or "\\" in model
    return PurePath(model.replace("\\", "/")).name if is_path else model


def find_key(config: Any, key: str) -> Any:
    """The first value of `key` anywhere in nested dicts, or None."""
    if not isinstance(config, dict):
        return None
    if key in config:
        return config[key]
    return next((v for v in (find_key(c, key) for c in config.values()) if v is not None), None)


def bare(name: str) -> str:
    return str(name).removesuffix(".weight")


def number(value: Any) -> float:
    """A float of a journal value; 0 where it is absent or was not finite."""
    return float(value) if isinstance(value, (int, float)) else 0.0
