"""Bad settings: DeepSpeed configs, "seft" blocks, flags and recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.hostile import damage
from benchmarks.hostile.runner import MARKER, Source, note
from seft_ds.config import (
    SeftConfig,
    check_batch_sizes,
    load_deepspeed_config,
    parse_seft,
    with_overrides,
)

NAMES = ("DeepSpeed config", "zero_optimization", '"seft"', "--seft", *SeftConfig.model_fields)
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
GOOD = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": True},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1000000000,
    "seft": {"window": 5, "density": 0.02, "interval": 10, "pattern": "auto"},
}
# Values of Python, for callers that pass a dict.
OBJECTS: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**40, 2**70, 10**400, 0.0, -0.5, 0.5, 1.5, float("nan"), float("inf"),
    -float("inf"), "", "x", "auto", "none", "2:4", "0:4", "rank=8", "rank=0", "rank=" + "9" * 30, "5", "nan",
    "\ud800", "x" * 1_000_000, [], [[]], ["q_proj"], ["x", None], [""], {}, {"a": 1}, (), b"x", object(),
    {1, 2}, 1j,
]  # fmt: skip


def sources(home: Path) -> list[Source]:
    found = [
        config_file(kind, lambda rng, path, kind=kind: damage.DAMAGE[kind](rng, path, path.parent))
        for kind in damage.DAMAGE
        if kind != "swapped"
    ]
    found += [
        config_file("fields of a config", edit_config),
        config_file("no JSON object", lambda rng, path: _text(rng, path, damage.strange_text)),
        config_file("a key twice", lambda rng, path: _text(rng, path, damage.duplicate_key)),
        Source("load_deepspeed_config", "a dict", config_dict, NAMES),
        Source("parse_seft", "fields of a block", block, NAMES),
        Source("parse_seft", "several fields", blocks, NAMES),
        Source("with_overrides", "fields of a block", overrides, NAMES),
        Source("check_batch_sizes", "fields of a config", batch_sizes, BATCH),
        Source("finetune arguments", "flags", _with_good(home, flags), FLAG_NAMES),
        Source("finetune arguments", "flags of SEFT", _with_good(home, seft_flags), FLAG_NAMES),
        Source("finetune arguments", "recipes", _with_good(home, recipes), FLAG_NAMES),
        Source("finetune arguments", "DeepSpeed configs", _with_good(home, ds_configs), FLAG_NAMES),
        Source("finetune arguments", "model configs", _with_good(home, model_configs), FLAG_NAMES),
    ]
    return found


def _text(rng: Random, path: Path, make: Callable) -> str:
    what, data = make(rng, path.read_text())
    path.write_bytes(data)
    return what


# load_deepspeed_config.


def config_file(kind: str, change: Callable[[Random, Path], str]) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        path = place / "config.json"
        path.write_text(json.dumps(GOOD))
        note(place, change(rng, path))
        if kind == "a key twice":
            load_deepspeed_config(path)
            return "a key twice was taken"
        return unsound(load_deepspeed_config(path))

    return Source("load_deepspeed_config", kind, attempt, NAMES)


def config_dict(rng: Random, place: Path) -> str | None:
    config = json.loads(json.dumps(GOOD))
    damage.edit_field(rng, config, rng.choice(OBJECTS))
    if rng.random() < 0.1:
        config["self"] = config
    return unsound(load_deepspeed_config(config))


def edit_config(rng: Random, path: Path) -> str:
    config = json.loads(path.read_text())
    what = damage.edit_field(rng, config)
    if rng.random() < 0.3:
        what += "; " + damage.add_field(rng, config)
    path.write_text(damage.dumps(config))
    return what


def unsound(config: Any) -> str | None:
    """Why a config that was taken should not have been."""
    if not isinstance(config, dict) or not isinstance(config["zero_optimization"], dict):
        return f"taken: {config!r:.100}"
    stage = config["zero_optimization"].get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        return f"stage {stage!r}"
    return unsound_seft(parse_seft(config.get("seft", {})))


def unsound_seft(config: SeftConfig) -> str | None:
    """Use an accepted block as a run does before its first step: it has to end soon, or be refused."""
    from seft_ds.schedule import Schedule, resolve_interval
    from seft_ds.targets import Target, assign_slots, total_slots

    for name, value in config.model_dump().items():
        if isinstance(value, (int, float)) and not math.isfinite(value):
            return f"{name} is {value}"
    targets = [Target(f"layers.{i}.q_proj", (24, 40), 400) for i in range(5)]
    total = 20 if config.total_steps == "auto" else int(config.total_steps)
    schedule = Schedule(
        total, resolve_interval(config.interval, config.window, total), config.window, config.drop_fraction,
        config.stop, len(targets), config.in_waves, config.start == "gradient",
    )  # fmt: skip
    schedule.in_window(0, 1)
    schedule.due(total)
    try:
        assign_slots(targets, total_slots(targets, config.density, config.trainable))
    except ValueError as error:
        assert "lower density" in str(error)
        return None
    return attached(config)


def attached(config: SeftConfig) -> str | None:
    """Give a tiny model its slots, as a run does."""
    from seft_ds.zero.attach import attach_slots
    from tests.ranks import run_threads
    from tests.tiny import tiny_model

    try:
        run_threads(1, lambda ranks: attach_slots(tiny_model("llama"), config, ranks))
    except ValueError as error:
        assert str(error).strip()
    return None


# The other functions.


def block(rng: Random, place: Path) -> str | None:
    name = rng.choice([*SeftConfig.model_fields, "dropfraction", "", "x" * 10_000])
    return unsound_seft(parse_seft({name: rng.choice(OBJECTS)}))


def blocks(rng: Random, place: Path) -> str | None:
    if rng.random() < 0.1:
        value = rng.choice([*OBJECTS, [("window", 3)], "window"])
        parse_seft(value)
        return None if value == {} else f"{value!r:.50} was taken"
    names = rng.sample([*SeftConfig.model_fields], rng.randrange(2, 6))
    strange: list[Any] = []
    strange.append(strange)  # holds itself
    return unsound_seft(
        parse_seft({n: rng.choice([*OBJECTS, strange, 5, 0.5, "auto"]) for n in names})
    )


def overrides(rng: Random, place: Path) -> str | None:
    names = rng.sample([*SeftConfig.model_fields], rng.randrange(1, 4))
    return unsound(with_overrides(GOOD, {n: rng.choice(OBJECTS) for n in names}))


def batch_sizes(rng: Random, place: Path) -> str | None:
    values = [*OBJECTS, 1, 2, 3, 4, 6, 8, 12, 16, "auto", -2, -4]
    config = {name: rng.choice(values) for name in rng.sample(BATCH, rng.randrange(1, 4))}
    ranks = rng.choice([1, 2, 3, 8])
    check_batch_sizes(config, ranks)
    for name, value in config.items():
        free = value is None or value == "auto"
        if not free and (type(value) is not int or value < 1):
            return f"{name} = {value!r}"
    total, micro, steps = (v if isinstance(v := config.get(n), int) else None for n in BATCH)
    if total is None:
        return None
    tries = [total // k for k in range(1, 20)]
    possible = any(
        m * s * ranks == total
        for m in ([micro] if micro else tries)
        for s in ([steps] if steps else [total // (m * ranks) if m else 0])
    )
    return None if possible else f"{config} on {ranks} ranks can't be had"


# The arguments of launch/finetune.py. Its imports take seconds, so they wait for the first use.

FLAG_NAMES = (
    "--", "seft", "DeepSpeed", "zero_optimization", "dtype", "config.json", "recipe", "transformers", *BATCH,
)  # fmt: skip
# These reach for the network or another accelerator.
_LEFT_OUT = (
    "push_to_hub",
    "hub_",
    "tpu",
    "use_ipex",
    "ddp_backend",
    "torch_compile",
    "trackio",
    "fsdp",
)
STRINGS = (
    "", " ", "-1", "0", "1", "-0.5", "nan", "inf", "-inf", "1e999", "1e400", "9" * 5000, "x", "true",
    "None", "null",
    "[]", "{}", '{"a": 1}', "[1, 2]", "[" * 5000, "{" * 5000, "\x00", "\x1b[2J", "é", "x" * 5000,
    "../..", "/",
    "/dev/null", "/dev/zero", "--", "-", "=", "auto", "steps", "no", "epoch", "best", "adamw_torch", "cosine",
    "a\nb", "\ud800", "1_000", "0x10", "٣", "1" * 400,
)  # fmt: skip


def _with_good(home: Path, attempt: Callable[[Random, Path, list[str]], list[str]]) -> Callable:
    """Run `parse` on what `attempt` makes of good arguments."""

    def run(rng: Random, place: Path) -> str | None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from seft_ds.distributed.collectives import init_ranks
        from seft_ds.train.arguments import parse

        init_ranks()
        config = place / "ds.json"
        config.write_text(json.dumps(GOOD))
        good = [
            "--model_name_or_path", str(home / "pruned-llama"), "--train_file", str(home / "data/text.jsonl"),
            "--output_dir", str(place / "out"), "--deepspeed", str(config), "--max_steps", "10",
        ]  # fmt: skip
        argv = attempt(rng, place, good)
        note(place, repr(argv)[:2000])
        try:
            arguments = parse(argv)
        finally:
            unset_hf_deepspeed_config()
        check_batch_sizes(arguments.deepspeed, 1)
        return _unsound_arguments(arguments)

    return run


def _unsound_arguments(arguments: Any) -> str | None:
    for name, value in vars(arguments.run).items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} is {value}"
    return unsound(arguments.deepspeed)


def _known_flags() -> list[str]:
    from seft_ds.train.arguments import (
        DataArguments,
        EvaluationArguments,
        MethodArguments,
        ModelArguments,
        RunArguments,
    )

    kinds = (MethodArguments, ModelArguments, DataArguments, EvaluationArguments, RunArguments)
    names = [f.name for c in kinds for f in fields(c) if f.init]
    return [n for n in names if not n.startswith(_LEFT_OUT)]


def flags(rng: Random, place: Path, good: list[str]) -> list[str]:
    name = rng.choice([*_known_flags(), "unknown", "", "learning-rate", "max_step"])
    value = rng.choice(STRINGS)
    way = rng.randrange(6)
    if way == 0:
        return [*good, f"--{name}"]
    if way == 1:
        return [*good, f"--{name}={value}"]
    if way == 2:
        return [value, *good]
    if way == 3:
        at = rng.randrange(0, len(good), 2)
        return [*good[:at], good[at], value, *good[at + 2 :]]
    return [*good, f"--{name}", value]


def seft_flags(rng: Random, place: Path, good: list[str]) -> list[str]:
    name = rng.choice([*SeftConfig.model_fields, "", "x", "a.b", "window.x"])
    value = rng.choice(STRINGS)
    tail = [f"--seft.{name}={value}"] if rng.random() < 0.5 else [f"--seft.{name}", value]
    return [*good, *(tail if rng.random() < 0.9 else tail[:1])]


def recipes(rng: Random, place: Path, good: list[str]) -> list[str]:
    path = place / "recipe.yaml"
    harm = place.parent / MARKER
    bomb = "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else 'a0: &a0 ["x","x","x"]\n'
        for i in range(12)
    )
    bomb_map = "a0: &a0 {k: v}\n" + "".join(
        f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 30)
    )
    texts: list[bytes] = [
        f"seft: !!python/object/apply:os.system ['touch {harm}']\n".encode(),
        f"max_steps: !!python/object/apply:subprocess.check_output [[touch, {harm}]]\n".encode(),
        b"x: !!python/name:os.system\n",
        b"x: !!python/object/new:type [a, [], {}]\n",
        b"x: !!python/tuple [1, 2]\n",
        b"max_steps: !unknown 5\n",
        bomb.encode(),
        bomb_map.encode(),
        bomb.encode() + b"seft: {targets: *a11}\n",
        bomb_map.encode() + b"seft: *a29\n",
        b"a: &a [*a]\n",
        b"a: &a {b: *a}\nseft: *a\n",
        b"seft: &s {window: 5}\n<<: *s\n",
        b"max_steps: 5\x00\n",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbfmax_steps: 5\n",
        "max_steps: 5\n".encode("utf-16"),
        b"max_steps: \xe9\n",
        b"[" * 5000,
        b"seft: " + b"[" * 3000 + b"]" * 3000 + b"\n",
        b"seft: " + b"{a: " * 300 + b"1" + b"}" * 300 + b"\n",
        b"- a\n- b\n",
        b"text\n",
        b"5\n",
        b"",
        b"---\n---\n",
        b"a: b: c\n",
        b"a: 'unclosed\n",
        b"\ta: 1\n",
        b"max_steps: 5\nmax_steps: 6\n",
        b"? [a, b]\n: 1\n",
        b"? {a: 1}\n: 1\n",
        b"1: 2\n",
        b"null: 2\n",
        b"true: 2\n",
        b"max_steps: 2026-13-45\n",
        b"max_steps: 2026-12-01\n",
        b"max_steps: !!timestamp x\n",
        b"max_steps: !!int x\n",
        b"max_steps: !!float x\n",
        b"max_steps: !!bool x\n",
        b"max_steps: !!binary '*'\n",
        b"max_steps: !!set {a, b}\n",
        b"max_steps: !!omap [a]\n",
        b"max_steps: " + b"9" * 10_000 + b"\n",
        b"learning_rate: .nan\n",
        b"learning_rate: 1e999\n",
        b"max_steps: 1:30\n",
        b"seft: 5\n",
        b"seft: [window]\n",
        b"seft: {window: {}}\n",
        b"seft: {window: [5]}\n",
        b"seft: {5: 5}\n",
        b"seft: {null: 5}\n",
        b"seft: {[a]: 5}\n",
        b"seft: {pattern: 2:4, targets: 5}\n",
        b"seft: {density: .inf}\n",
        b"seft: {targets: [1, 2]}\n",
        b"deepspeed: {}\n",
        b"deepspeed: {zero_optimization: 5}\n",
        b"deepspeed: /dev/zero\n",
        b"config: x.yaml\n",
        b"config: recipe.yaml\n",
        b"train_file: [a, b]\n",
        b"report_to: [none, wandb]\n",
        b"output_dir: null\n",
        b"output_dir: ''\n",
        b"'': 5\n",
        b"'--max_steps': 5\n",
        b"'max_steps=5': 5\n",
        b"'a b': 5\n",
        b"gradient_checkpointing_kwargs: {a: {b: [1, {c: null}]}}\n",
        b"lr_scheduler_kwargs: 5\n",
        b"lr_scheduler_kwargs: [5]\n",
        b"optim_args: {a: b}\n",
        b"accelerator_config: {x: 1}\n",
        b"accelerator_config: [1]\n",
        b"x" * 5_000_000,
        b"a: " + b"x" * 5_000_000,
        b"max_steps: " + b"\xf0\x9f\x98\x80" * 1000,
        *(f"{name}: {value!r}\n".encode("utf-8", "surrogateescape" if value != "\ud800" else "replace")
          for name, value in [(rng.choice(_known_flags()), rng.choice(STRINGS)) for _ in range(20)]),
    ]  # fmt: skip
    path.write_bytes(rng.choice(texts))
    if rng.random() < 0.2:
        damage.DAMAGE[rng.choice([k for k in damage.DAMAGE if k != "swapped"])](rng, path, place)
    return ["--config", str(path), *good]


def ds_configs(rng: Random, place: Path, good: list[str]) -> list[str]:
    path = place / "ds.json"
    way = rng.randrange(10)
    if way == 0:
        _text(rng, path, damage.strange_text)
    elif way == 1:
        damage.DAMAGE[rng.choice([k for k in damage.DAMAGE if k != "swapped"])](rng, path, place)
    else:
        edit_config(rng, path)
    return good


def model_configs(rng: Random, place: Path, good: list[str]) -> list[str]:
    """The model's config.json, of which `parse` reads the dtype."""
    folder = place / "model"
    folder.mkdir()
    path = folder / "config.json"
    config = {"model_type": "llama", "dtype": "float32"}
    path.write_text(json.dumps(config))
    way = rng.randrange(3)
    if way == 0:
        _text(rng, path, damage.strange_text)
    elif way == 1:
        damage.DAMAGE[rng.choice([k for k in damage.DAMAGE if k != "swapped"])](rng, path, place)
    else:
        config["dtype"] = rng.choice(damage.VALUES)
        path.write_text(damage.dumps(config))
    return ["--model_name_or_path", str(folder), *good[2:]]
