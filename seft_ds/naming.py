"""What the files of a mixture of experts call the matrices that transformers 5 holds in one fused tensor.

transformers keeps all experts of a layer in `experts.gate_up_proj` (experts, 2 · intermediate, hidden) and
`experts.down_proj` (experts, hidden, intermediate). On disk, as published, every expert's matrix is a tensor
of its own. A fused tensor's *parts* are these matrices, in the order of its flat positions:

    gate_up_proj    part 2e: expert e's gate, part 2e + 1: its up projection
    down_proj       part e: expert e's down projection

Read in transformers 5.23.0, conversion_mapping.py. Families whose names were not tried are not listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

# Fused parameter -> how many matrices of each expert it holds.
FUSED = {"gate_up_proj": 2, "down_proj": 1}
# Last parts of the names of layers that choose experts, or weigh one: never pruned and never targets.
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Naming:
    """The names of one family's files. Without `matrices`: those of the model itself."""

    matrices: tuple[
        tuple[str, tuple[str, ...]], ...
    ] = ()  # fused parameter -> its matrices in files
    block: tuple[str, str] = ("", "")  # part of a name in the model, and what the files have for it
    # The family's name of a tensor -> the name that one folder has for it, where they differ: families whose
    # names transformers changes when it loads, and folders whose names lack the base model's prefix.
    own: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @cached_property
    def _usual(self) -> dict[str, str]:
        return {own: usual for usual, own in self.own.items()}

    def in_files(self, name: str) -> str:
        """The name in files of a tensor that is not fused."""
        usual = name.replace(*self.block, 1) if self.block[0] else name
        return self.own.get(usual, usual)

    def in_model(self, stored: str) -> str:
        """The reverse of `in_files`."""
        usual = self._usual.get(stored, stored)
        return usual.replace(self.block[1], self.block[0], 1) if self.block[0] else usual

    def is_fused(self, name: str) -> bool:
        """Whether a parameter of the model is in files by matrices."""
        return any(name.endswith(f".experts.{fused}") for fused, _ in self.matrices)

    def part_names(self, fused: str, experts: int) -> list[str]:
        """The tensors in files of a fused parameter ("model.layers.3.mlp.experts.down_proj"), by part."""
        owner, _, parameter = fused.rpartition(".")
        matrices = dict(self.matrices)[parameter]
        owner = owner.replace(*self.block, 1) if self.block[0] else owner
        usual = [f"{owner}.{e}.{matrix}.weight" for e in range(experts) for matrix in matrices]
        return [self.own.get(name, name) for name in usual]

    def fused_name(self, stored: str) -> str | None:
        """The fused parameter that a tensor of the files is a part of, or None."""
        stored = self.in_model(stored)
        found = re.fullmatch(r"(.+\.experts)\.\d+\.([^.]+)\.weight", stored)
        if found is None:
            return None
        for fused, matrices in self.matrices:
            if found[2] in matrices:
                return f"{found[1]}.{fused}"
        return None


PLAIN = Naming()
_GATE_UP_DOWN = Naming((("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))))
_MIXTRAL = Naming(
    (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))), (".mlp.", ".block_sparse_moe.")
)
_LFM = Naming((("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))))
# Each was pruned, repaired, written and read again by benchmarks/families.py. Their experts all compute the
# same; those of longcat_flash and deepseek_v4 don't, and granitemoe's are one tensor in files too.
_OF_MODEL_TYPE = {
    **dict.fromkeys(
        (
            "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
            "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "jamba",
            "mellum", "mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "solar_open",
        ),
        _GATE_UP_DOWN,
    ),
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral", "phimoe"), _MIXTRAL),
    "lfm2_moe": _LFM,
}  # fmt: skip
WITH_EXPERTS = tuple(_OF_MODEL_TYPE)


def naming_of(model_type: object) -> Naming:
    """The naming of a config's `model_type`; `PLAIN` for a family that has none of its own."""
    return _OF_MODEL_TYPE.get(str(model_type), PLAIN)


def naming_of_model(model: Any) -> Naming:
    """The naming of a transformers model."""
    return naming_of(getattr(getattr(model, "config", None), "model_type", None))


def is_router(name: str) -> bool:
    """Whether a layer chooses experts or weighs one ("model.layers.0.mlp.shared_expert_gate")."""
    return name.rpartition(".")[2] in ROUTERS


def separate_experts(names: Sequence[str]) -> str | None:
    """A layer that belongs to one expert of a list of modules, or None.

    Such experts run or don't, depending on the tokens, so that ranks would wait for each other.
    """
    return next((name for name in names if re.search(r"\.experts\.\d+\.", name)), None)
