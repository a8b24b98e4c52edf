"""Turns become what chat templates know, whoever wrote them down; what nobody knows is refused."""

from __future__ import annotations

from typing import Any

import pytest

from seft_ds.train.chats import Empty, alpaca_prompt, messages_of, tools_of, with_system

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "turns, messages",
    [
        ([{"from": "human", "value": "hi"}], [USER]),
        ([{"from": "gpt", "value": "a"}], [{"role": "assistant", "content": "a"}]),
        ([{"role": "User", "content": "hi", "name": None}], [USER]),
        ([{"from": "observation", "value": "sun"}], [{"role": "tool", "content": "sun"}]),
        ([{"role": "critic", "content": "no"}], [{"role": "critic", "content": "no"}]),
        (
            [{"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'}],
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                    ],
                }
            ],
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        ),
    ],
)
def test_turns(turns: list[dict], messages: list[dict]) -> None:
    assert messages_of(turns, extra_roles=("critic",)) == messages


@pytest.mark.parametrize(
    "turns, error, said",
    [
        ([], Empty, "no messages"),
        (None, Empty, "no messages"),
        ([USER, {"from": "gpt", "value": None}], Empty, "without text"),
        ([USER, {"role": "critic", "content": "a"}], ValueError, "turn 2 has the role 'critic'"),
        ([{"content": "a"}], ValueError, "turn 1 has no role"),
        ([USER, {"role": "user", "content": 5}], ValueError, "turn 2 has the content 5"),
        (["hi"], ValueError, "turn 1 is 'hi'"),
        ("hi", ValueError, "no list"),
        ([{"from": "function_call", "value": "f(x)"}], ValueError, "wanted JSON with a name"),
    ],
)
def test_turns_that_nobody_knows(turns: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        messages_of(turns)


def test_system_and_tools() -> None:
    system = {"role": "system", "content": "be short"}
    assert with_system([USER], "be short") == [system, USER]
    assert with_system([USER], None) == with_system([USER], "") == [USER]
    assert with_system([system, USER], "be long") == [system, USER]
    assert tools_of('[{"name": "f"}]') == tools_of({"name": "f"}) == [{"name": "f"}]
    assert tools_of("[]") is tools_of("") is tools_of(None) is tools_of([]) is None
    with pytest.raises(ValueError, match="wanted a list"):
        tools_of("call f")


def test_earlier_turns_of_an_alpaca_row_go_before_it() -> None:
    row = {"instruction": "c", "input": "", "history": [["a", "b"]], "system": "be short"}
    assert alpaca_prompt(row) == (
        "be short\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    )
    plain = alpaca_prompt({"instruction": "c", "input": "d", "history": None})
    assert plain.startswith("Below is an instruction that describes a task, paired with an input")
    assert plain.endswith("request.\n\n### Instruction:\nc\n\n### Input:\nd\n\n### Response:\n")
    with pytest.raises(ValueError, match="a question and its answer"):
        alpaca_prompt(row | {"history": [["a"]]})
