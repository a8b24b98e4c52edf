"""What a model can be fed: how many tokens at once, and which ids its embedding has rows for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Names of the same limit in different families; transformers maps some of them onto the first.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
_SHOWN = 3


def longest_tokens(config: Any) -> int | None:
    """The most tokens that a model takes at once, by its config; None if that says no limit.

    Sliding windows, ALiBi and rotary embeddings that are rescaled to any length ("dynamic") set none.
    """
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is not None:
        config = get_text_config()
    if getattr(config, "alibi", None) is True:  # Falcon; MPT's biases do end
        return None
    found = [getattr(config, name, None) for name in _NAMES]
    limits = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if not limits:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []  # one for each kind of layer
    scaled = [_rescaled(kind, max(limits)) for kind in kinds if isinstance(kind, dict)]
    if None in scaled:
        return None
    return max([*limits, *(n for n in scaled if n is not None)])


def _rescaled(rope: dict[str, Any], limit: int) -> int | None:
    """The length that rotary embeddings are stretched to; None: any."""
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind == "dynamic":
        return None
    if kind in (None, "default") or not isinstance(factor, (int, float)):
        return limit
    original = rope.get("original_max_position_embeddings")
    return int((original if isinstance(original, int) else limit) * factor)


def check_positions(length_tokens: int | None, config: Any, model: str) -> None:
    """ValueError if a model can't take sequences of --max_length tokens."""
    longest = longest_tokens(config)
    if longest is not None and length_tokens is not None and length_tokens > longest:
        raise ValueError(
            f"got --max_length {length_tokens}, but {model} takes {longest} tokens; give that or less"
        )


def embedding_rows(model: torch.nn.Module) -> int | None:
    """Ids below this number have a row in the model's embedding and, where it has its own, in its head."""
    rows = []
    for find, size in (
        ("get_input_embeddings", "num_embeddings"),
        ("get_output_embeddings", "out_features"),
    ):
        try:
            layer = getattr(model, find)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(getattr(layer, size, None), int):
            rows.append(getattr(layer, size))
    return min(rows, default=None)


def check_ids(
    ids: Sequence[int], rows: int | None, tokenizer: Any, what: str, instead: str = ""
) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        ids: those that occur, in any order.
        rows: of the embedding; None: unknown.
        what: holds them.
        instead: what can be done in place of leaving them out of the text.

    Raises:
        ValueError: naming some of them.
    """
    beyond = sorted({i for i in ids if rows is not None and i >= rows})
    if not beyond:
        return
    names = [f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in beyond[:_SHOWN]]
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    raise ValueError(
        f"{what}: the tokenizer writes {', '.join(names)}{more}, and the model's embedding has {rows} rows "
        f"(ids below {rows}): tokens were added without resizing it; "
        f"{instead or 'take them out of the text'}, or call model.resize_token_embeddings(len(tokenizer)) on "
        "the model before it is pruned"
    )
