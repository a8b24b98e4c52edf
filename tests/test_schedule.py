from __future__ import annotations

import itertools

import pytest

from seft_ds.schedule import Schedule, resolve_interval, without_effect


def make(**kw) -> Schedule:
    settings = dict(
        total_steps=100, interval=10, window=4, drop_fraction=0.2, stop=0.8, n_targets=7
    )
    return Schedule(**{**settings, **kw})


def test_auto_interval() -> None:
    assert resolve_interval("auto", 5, 30) == 10
    assert resolve_interval("auto", 5, 60) == 12
    assert resolve_interval("auto", 5, 100) == 20
    assert resolve_interval("auto", 5, 4000) == 100
    assert resolve_interval("auto", 25, 100) == 25
    assert resolve_interval(7, 5, 4000) == 7


@pytest.mark.parametrize("waves", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_every_weight_evolves_once_an_interval_with_a_whole_window_before(waves, replace) -> None:
    s = make(waves=waves, replace_all_first=replace)
    for target in range(s.n_targets):
        events = [t for t in range(1, 101) if s.rate(target, t) is not None]
        assert events and events[-1] <= s.stop_step
        regular = events[1:] if replace else events
        assert all(b - a == s.interval for a, b in zip(regular, regular[1:]))
        for event in events:
            window = [t for t in range(1, 101) if s.in_window(target, t) and event - 4 < t <= event]
            assert len(window) == min(4, event)
        assert not s.in_window(target, events[-1] + 1)


def test_whether_a_run_evolves_is_known_without_going_through_it() -> None:
    seen = set()
    for total in range(1, 40):
        for interval, window, stop in itertools.product((3, 5, 30), (1, 3), (0.1, 0.5, 0.8, 1.0)):
            for waves, replace in itertools.product((True, False), repeat=2):
                s = make(
                    total_steps=total, interval=interval, window=window, stop=stop, waves=waves,
                    replace_all_first=replace,
                )  # fmt: skip
                evolving = {i for step in range(1, total + 1) for i in s.due(step)}
                found = bool(evolving)
                assert s.evolves == found and s.without_event() == 7 - len(evolving), s
                rates = [s.rate(i, step) for i in range(7) for step in range(1, total + 1)]
                assert s.largest_rate == max((r for r in rates if r is not None), default=None)
                seen.add(found)
    assert seen == {True, False}
    assert make(total_steps=1 << 40, interval=1 << 39, window=1, stop=0.1).evolves is False


def test_rate_falls_from_the_fraction_to_zero() -> None:
    s = make(waves=False)
    rates = [s.rate(0, t) for t in range(10, 80, 10)]
    assert all(a > b for a, b in zip(rates, rates[1:]))
    assert 0.18 < rates[0] < 0.2 and s.rate(0, 80) is None and s.rate(0, 90) is None


def test_first_event_of_a_gradient_start_replaces_every_slot() -> None:
    s = make(waves=False, replace_all_first=True)
    assert s.rate(0, 4) == 1.0 and s.rate(0, 3) is None and s.rate(0, 10) < 0.2


def test_waves_bound_how_many_windows_are_open() -> None:
    s = make(n_targets=200, interval=20, window=5)
    open_windows = [sum(s.in_window(i, t) for i in range(200)) for t in range(1, 80)]
    assert max(open_windows) <= 200 * 5 / 20
    assert max(len(s.due(t)) for t in range(1, 101)) == 10
    together = make(n_targets=200, interval=20, window=5, waves=False)
    assert max(sum(together.in_window(i, t) for i in range(200)) for t in range(1, 80)) == 200


def test_no_events_with_a_drop_fraction_of_zero() -> None:
    s = make(drop_fraction=0.0)
    assert not any(s.due(t) for t in range(1, 101))


def test_exchanges_come_after_the_first_window_and_then_an_interval_apart() -> None:
    s = make(total_steps=100, interval=20, window=5, exchange=0.1, exchanges=3)
    assert [(t, r) for t in range(1, 101) if (r := s.exchange_rate(t))] == [
        (5, 0.1), (25, 0.1), (45, 0.1),
    ]  # fmt: skip
    measured = [t for t in range(1, 101) if s.in_exchange_window(t)]
    assert measured == [*range(1, 6), *range(21, 26), *range(41, 46)]
    late = make(total_steps=50, interval=20, window=5, exchange=0.1, exchanges=3)
    assert [t for t in range(1, 51) if late.exchange_rate(t)] == [5, 25]  # stop is at 40
    assert (s.exchanges_that_fit(), late.exchanges_that_fit()) == (3, 2)
    short = make(total_steps=6, window=5, exchange=0.1)
    assert short.exchanges_that_fit() == 0 and short.exchange_rate(5) is None
    assert not any(
        make(total_steps=100, interval=20, window=5).exchange_rate(t) for t in range(101)
    )


def test_what_a_run_is_too_short_for_is_said() -> None:
    def said(slots: list[int], together: bool = False, exchanging: bool = False, **kw) -> str:
        return " | ".join(without_effect(make(**kw), slots, together, exchanging))

    assert said([50] * 7) == said([50] * 7, exchanging=True, exchange=0.1) == ""
    assert "no evolution event fits into 9 steps" in said([50] * 7, total_steps=9)
    replacing = {"drop_fraction": 0.0, "replace_all_first": True}
    assert "no evolution event fits into 4 steps" in said([50] * 7, total_steps=4, **replacing)
    assert said([50] * 7, drop_fraction=0.0, total_steps=9) == ""
    assert "at most 4 slots is less than one" in said([4, 3]) and said([4, 3], together=True) == ""
    # Phases 0, 1, 2, 4, 5, 7, 8: with stop at 16 the last two would begin at 17 and 18.
    assert said([50] * 7, total_steps=20).startswith("2 of 7 weights have no event in 20 steps")
    assert "no exchange fits" in said(
        [50], exchanging=True, exchange=0.1, total_steps=4, drop_fraction=0.0
    )
    few = said([50], exchanging=True, exchange=0.1, exchanges=9, drop_fraction=0.0)
    assert few.startswith("8 of 9 exchanges fit into 100 steps")
