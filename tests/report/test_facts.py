"""Sums over a journal, by hand."""

from __future__ import annotations

from seft_ds.report.facts import (
    by_projection,
    churn,
    deviations,
    facts_of,
    live_totals,
    per_step,
    split_name,
)


def _target(name, live=6):
    return {"name": name, "shape": [3, 4], "live": live, "slots": 2}


def _event(step, target, live=6, **more):
    counts = {"dropped": 2, "grown": 2, "revived": 1, "pruned": 1}
    fields = {"kind": "event", "step": step, "target": target, "target_live": 6, "live": live}
    return {**fields, **counts, "seconds": 0.5, "bytes": 100, **more}


Q0, Q1, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "up"
RUN = {"kind": "run", "targets": [_target(Q0 + ".weight"), _target(Q1), _target(UP)]}


def test_a_repeated_step_counts_once_and_the_later_one_stands():
    steps = [
        {"kind": "step", "step": s, "loss": loss, "seconds": 1.0}
        for s, loss in [(1, 3.0), (2, 2.0), (3, 9.0)]
    ]
    again = [{"kind": "step", "step": 3, "loss": 1.5, "seconds": 1.0}]
    events = [_event(2, Q0), _event(3, Q0, revived=5)]
    facts = facts_of([RUN, *steps, *events, {"kind": "end", "live": 1}, RUN, *again, _event(3, Q0)])
    assert facts.losses == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert facts.starts == 2 and facts.end == {} and facts.seconds == 3.0
    assert [e["revived"] for e in facts.events] == [1, 1]
    assert facts.event_seconds == 1.0 and facts.event_bytes == 200


def test_two_weights_of_one_step_are_two_events():
    facts = facts_of([RUN, _event(2, Q0), _event(2, Q1), _event(4, Q0)])
    assert per_step(facts.events, "bytes") == [(2, 200.0), (4, 100.0)]


def test_loss_that_is_not_finite_is_counted_and_not_drawn():
    facts = facts_of([{"kind": "step", "step": s, "loss": v} for s, v in [(1, 2.0), (2, None)]])
    assert facts.losses == [(1, 2.0)] and facts.steps_not_finite == 1


def test_deviation_is_the_worst_weight_of_a_step_with_its_sign():
    facts = facts_of([RUN, _event(2, Q0, live=7), _event(2, Q1, live=4), _event(3, Q0)])
    assert deviations(facts) == [(2, -2), (3, 0)]
    assert live_totals(facts) == (6 + 4 + 6, 18)


def test_with_global_scope_the_sum_is_what_deviates():
    run = {**RUN, "config": {"seft": {"scope": "global"}}}
    facts = facts_of([run, _event(2, Q0, live=7), _event(2, Q1, live=5), _event(3, Q0, live=9)])
    assert deviations(facts) == [(2, 0), (3, 2)]


def test_the_end_record_has_the_last_word_on_live_counts():
    facts = facts_of([RUN, _event(2, Q0), {"kind": "end", "live": 17, "target_live": 18}])
    assert live_totals(facts) == (17, 18)


def test_churn_is_in_percent_of_the_live_count_and_skips_unnumbered_weights():
    facts = facts_of([RUN, _event(2, Q0, revived=3), _event(3, Q1), _event(3, UP), _event(4, Q1)])
    layers, projections, percent = churn(facts, "revived")
    assert (layers, projections) == ([0, 1], ["self_attn.q_proj"])
    assert percent == [[50.0, 100 * 2 / 6]]


def test_rows_per_projection_add_up():
    rows = {
        r["projection"]: r for r in by_projection(facts_of([RUN, _event(2, Q0), _event(3, Q1)]))
    }
    q = rows["self_attn.q_proj"]
    assert (q["tensors"], q["weights"], q["live"], q["slots"]) == (2, 24, 12, 4)
    assert (q["events"], q["dropped"], q["revived"], q["kept"]) == (2, 4, 2, 0)
    assert rows["up"]["events"] == 0


def test_names_split_into_layer_and_projection():
    assert split_name("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj")
    assert split_name("h.3.mlp.experts.11.w1") == (3, "mlp.experts.*.w1")
    assert split_name("lm_head.weight") == (None, "lm_head")


def test_an_exchange_counts_as_an_event_of_each_weight_that_takes_part() -> None:
    targets = [{"name": f"layers.{i}.q", "live": 10, "shape": [4, 5], "slots": 1} for i in (0, 1)]
    run = {"kind": "run", "targets": targets, "config": {"seft": {"scope": "global"}}}
    counts = {
        "layers.0.q": {"revived": 3, "pruned": 0, "live": 13},
        "layers.1.q": {"revived": 0, "pruned": 3, "live": 7},
    }
    exchange = {"kind": "exchange", "step": 3, "targets": counts, "seconds": 2.0, "bytes": 8}
    facts = facts_of([run, exchange, {**exchange, "seconds": 4.0}])  # a resumed run tells it again
    assert facts.event_seconds == 4.0 and len(facts.events) == 2
    assert facts.changes("event") == "1 exchange"
    assert live_totals(facts) == (20, 20) and deviations(facts) == [(3, 0)]
    assert churn(facts, "revived")[2] == [[30.0, 0.0]]
    for broken in (None, [1], {"layers.0.q": 5}):
        assert facts_of([run, {**exchange, "targets": broken}]).events == []
