"""seft-ds: repair pruned LLMs at fixed sparsity, as a DeepSpeed engine extension.

`attach` gives a pruned model its slots, `initialize` makes a DeepSpeed engine that evolves them.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: importing DeepSpeed takes seconds, and verifying files needs none of it.
_PUBLIC = {
    "SeftConfig": "seft_ds.config",
    "SeftCallback": "seft_ds.train.callback",
    "attach": "seft_ds.api",
    "init_ranks": "seft_ds.distributed.collectives",
    "initialize": "seft_ds.api",
    "save_model": "seft_ds.checkpoint.model",
    "verify": "seft_ds.checkpoint.verify",
}
__all__ = [
    "SeftCallback",
    "SeftConfig",
    "attach",
    "init_ranks",
    "initialize",
    "save_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'seft_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
