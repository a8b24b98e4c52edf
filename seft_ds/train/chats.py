"""Turns of conversations as chat templates know them, whoever wrote them down.

ShareGPT's and LLaMA-Factory's roles become those of the OpenAI format, a function call becomes `tool_calls`,
a `system` column becomes the first message, and the earlier turns of an Alpaca row become part of its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from seft_ds.json_file import shown

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")


class Empty(Exception):
    """A row without what it would teach; it is left out and counted."""


def messages_of(turns: Any, extra_roles: Iterable[str] = ()) -> list[dict[str, Any]]:
    """A conversation as messages with role and content, without keys that hold nothing.

    Args:
        turns: dicts with "role" and "content", or "from" and "value".
        extra_roles: names that the chat template knows beside `ROLES`.

    Raises:
        Empty: no turns, or one without text.
        ValueError: something that is no turn, or a role that nobody knows.
    """
    if turns is None or (isinstance(turns, list) and not turns):
        raise Empty("no messages")
    if not isinstance(turns, list):
        raise ValueError(f"{shown(turns)} is no list of messages")
    return [_message(turn, number, extra_roles) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, number: int, extra_roles: Iterable[str]) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is {shown(turn)}; wanted role and content")
    found = {key: value for key, value in turn.items() if value is not None}
    role = found.pop("role", None) or found.pop("from", None)
    found.pop("from", None)
    content = found.pop("content", None)
    value = found.pop("value", None)
    content = value if content is None else content
    if not isinstance(role, str):
        raise ValueError(f"turn {number} has no role")
    kind = role.strip().lower()
    if kind in _CALLS and isinstance(content, str):
        return {"role": "assistant", "content": "", **found, "tool_calls": _calls(content, number)}
    known = role if role in extra_roles else ROLES.get(kind)
    if known is None:
        raise ValueError(
            f"turn {number} has the role {role!r:.60}, which neither the chat template nor this program "
            f"knows; wanted one of {', '.join(ROLES)}"
        )
    if content is None and not found.get("tool_calls"):
        raise Empty("a turn without text")
    if not isinstance(content, (str, list, type(None))):
        raise ValueError(f"turn {number} has the content {shown(content)}; wanted text")
    # Templates differ in what they make of None beside calls; all of them write an empty text as nothing.
    return {"role": known, "content": "" if content is None else content, **found}


def _calls(text: str, number: int) -> list[dict[str, Any]]:
    """The calls in the text of a function_call turn, in the form that chat templates read."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    found = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(
                f"turn {number} calls a function by {shown(text)}; wanted JSON with a name and arguments"
            )
        arguments = parsed(inner.get("arguments", inner.get("parameters", {})))
        function = {"name": inner["name"], "arguments": arguments}
        found.append({"type": "function", "function": function})
    return found


def parsed(value: Any) -> Any:
    """What a string of JSON stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tools_of(value: Any) -> list[Any] | None:
    """The tools of a row for the chat template; None if there are none.

    Raises:
        ValueError: text that is no JSON, or no list.
    """
    tools = parsed(value) if not isinstance(value, str) or value.strip() else None
    if isinstance(tools, dict):
        tools = [tools]
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools are {shown(value)}; wanted a list, or a list as JSON")
    return tools


def without_nothing(value: Any) -> Any:
    """A nested value without the keys that hold None: what a table adds where rows differ in their keys."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nothing(v) for v in value]
    return value


def with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Put the text of a `system` column before messages that have no system message of their own."""
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system is {shown(system)}; wanted text")
    return [{"role": "system", "content": system}, *messages]


def calls_functions(messages: list[dict[str, Any]]) -> bool:
    return any(message.get("tool_calls") for message in messages)


def unwritten_keys(messages: list[dict[str, Any]], template: str) -> list[str]:
    """Keys of turns that a chat template never mentions, such as `weight`."""
    keys = {key for message in messages for key in message}
    return sorted(key for key in keys - set(_KEYS) if key not in template)


def alpaca_prompt(row: dict[str, Any]) -> str:
    """The prompt that Alpaca-style models are trained with; earlier turns in the form of LLaMA-Factory.

    Raises:
        ValueError: a history that is no list of questions and answers.
    """
    if row.get("input"):
        opening = "an instruction that describes a task, paired with an input that provides further context"
        middle = f"### Input:\n{row['input']}\n\n"
    else:
        opening, middle = "an instruction that describes a task", ""
    system = f"Below is {opening}. Write a response that appropriately completes the request."
    text = f"{row.get('system') or system}\n\n"
    for pair in row.get("history") or []:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise ValueError(f"history has {shown(pair)}; wanted a question and its answer")
        text += f"### Instruction:\n{pair[0]}\n\n### Response:\n{pair[1]}\n\n"
    return f"{text}### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"
