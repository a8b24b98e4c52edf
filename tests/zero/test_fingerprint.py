"""Fingerprints against a slow reference, over partitions, and of real engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seft_ds.sparse.shard import shard_range
from seft_ds.zero import fingerprint as module
from seft_ds.zero.fingerprint import fingerprint, model_fingerprints
from tests.ranks import ThreadRanks, run_processes, run_threads
from tests.tiny import tiny_model
from tests.zero.test_engine import STAGES, config

WRAP = 1 << 64
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip


def slow_fingerprint(values: torch.Tensor, lo: int) -> int:
    """One value after the other, in Python's integers."""
    size = values.element_size()
    raw = values.view(torch.uint8).numpy().tobytes()
    total = 0
    for i in range(values.numel()):
        bits = int.from_bytes(raw[i * size : (i + 1) * size], "little", signed=True)
        x = (bits + (lo + i + 1) * 0x9E3779B97F4A7C15) % WRAP
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WRAP
        total += x ^ (x >> 31)
    return total % WRAP


def random_bits(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits there are: NaNs, infinities and subnormals too."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(n, generator=g) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (n * size,), dtype=torch.uint8, generator=g).view(dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_CHUNK", 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lo", [0, 12345, (1 << 33) + 7])
def test_is_the_slow_one(dtype: torch.dtype, lo: int, small_chunks: None) -> None:
    for n in (0, 1, 15, 16, 17, 100):
        values = random_bits(n, dtype, seed=n)
        assert fingerprint(values, lo) == slow_fingerprint(values, lo)


def test_stays_what_it_was() -> None:
    """Fingerprints may be kept in files."""
    assert fingerprint(torch.arange(10.0), 0) == 0xE654A61C1F8A8DBD


def test_chunks_of_the_real_size() -> None:
    n = 2 * module._CPU_CHUNK + 5
    values = random_bits(n, torch.bfloat16)
    assert fingerprint(values, 0) == slow_fingerprint(values, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_any_partition_adds_up(dtype: torch.dtype, small_chunks: None) -> None:
    values = random_bits(203, dtype)
    whole = fingerprint(values, 0)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        cuts = torch.randint(0, 204, (seed,), generator=g).sort().values.tolist()
        borders = list(zip([0, *cuts], [*cuts, 203]))
        assert sum(fingerprint(values[a:b], a) for a, b in borders) % WRAP == whole
    for size in (1, 2, 3, 4, 7, 300):
        borders = [shard_range(203, r, size) for r in range(size)]
        assert sum(fingerprint(values[a:b], a) for a, b in borders) % WRAP == whole


def test_a_view_with_gaps() -> None:
    values = random_bits(64, torch.float32)
    assert fingerprint(values[::2], 5) == fingerprint(values[::2].clone(), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_single_bit_counts(dtype: torch.dtype) -> None:
    values = torch.randn(40).to(dtype)
    values[::3] = 0
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    width = values.element_size() * 8
    seen = {fingerprint(values, 0)}
    for position in (0, 1, 3, 17, 39):
        for bit in range(width):
            flipped = values.clone().view(integer)
            flipped[position] ^= (1 << bit) - (1 << width if bit == width - 1 else 0)
            seen.add(fingerprint(flipped.view(dtype), 0))
    assert len(seen) == 1 + 5 * width


def test_the_sign_of_zero_counts() -> None:
    assert fingerprint(torch.tensor([0.0]), 3) != fingerprint(torch.tensor([-0.0]), 3)


def test_places_count() -> None:
    values = torch.randn(30)
    values[10:20] = 0
    seen = {fingerprint(values, 0)}
    swaps = [(i, j) for i in range(30) for j in range(i) if values[i] != values[j]]
    for i, j in swaps:
        order = torch.arange(30)
        order[i], order[j] = j, i
        seen.add(fingerprint(values[order], 0))
    assert len(seen) == 1 + len(swaps)
    assert fingerprint(values, 0) != fingerprint(values, 1)
    assert fingerprint(torch.zeros(5), 0) != fingerprint(torch.zeros(6), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GPU_CHUNK", 1 << 12)
    for dtype in DTYPES:
        values = random_bits(10_001, dtype)
        assert fingerprint(values.cuda(), 9) == slow_fingerprint(values, 9)


def whole(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "norm": (3,), "scalar": (), "t": (4, 6)}
    named = {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}
    named["t"].data = named["t"].data.T  # not contiguous
    return named


def cut_up(param: nn.Parameter, ranks: ThreadRanks) -> nn.Parameter:
    """As ZeRO-3 leaves a parameter: a placeholder, and this rank's shard with anything in its tail."""
    flat = param.data.reshape(-1)
    lo, hi = shard_range(flat.numel(), ranks.rank, ranks.size)
    shard = torch.full((-(-flat.numel() // ranks.size),), float(ranks.rank), dtype=flat.dtype)
    shard[: hi - lo] = flat[lo:hi]
    left = nn.Parameter(flat.new_empty(0))
    left.ds_tensor, left.ds_numel, left.ds_shape = shard, flat.numel(), param.shape
    return left


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", [(), ("a",), ("norm", "t"), ("a", "norm", "scalar", "t")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partitioned_whole_and_mixed(size: int, cut: tuple, dtype: torch.dtype) -> None:
    plain = {n: p.data.reshape(-1) for n, p in whole(dtype=dtype).items()}
    wanted = {n: f"{slow_fingerprint(v, 0):016x}" for n, v in plain.items()}

    def work(ranks: ThreadRanks) -> dict[str, str]:
        named = whole(dtype=dtype)
        return model_fingerprints(named | {n: cut_up(named[n], ranks) for n in cut}, ranks)

    assert run_threads(size, work) == [wanted] * size


def errors(change) -> list[str]:
    """What 3 ranks raise after `change(named, rank)` of each one's whole parameters."""

    def work(ranks: ThreadRanks) -> str:
        named = whole()
        change(named, ranks.rank)
        with pytest.raises(ValueError) as caught:
            model_fingerprints(named, ranks)
        return str(caught.value)

    return run_threads(3, work)


def test_copies_that_differ_are_named() -> None:
    def one_bit(named: dict[str, nn.Parameter], rank: int) -> None:
        if rank == 1:
            named["a"].data.view(torch.int32)[2, 3] ^= 1

    found = errors(one_bit)
    assert found[0] == found[1] == found[2]
    kept = f"{slow_fingerprint(whole()['a'].data.view(-1), 0):016x}"
    assert f"differ between ranks: a is {kept} on ranks 0, 2 and " in found[0]
    assert found[0].endswith(" on rank 1; give every machine the same model files")

    def others(named: dict[str, nn.Parameter], rank: int) -> None:
        named |= whole(seed=rank)

    assert errors(others)[0].count(" is ") == 3 and "and 1 more; give" in errors(others)[0]


def test_a_missing_weight_is_named() -> None:
    def leave_out(named: dict[str, nn.Parameter], rank: int) -> None:
        if rank == 2:
            del named["norm"]

    found = errors(leave_out)
    assert found[0] == found[1] == found[2] and "and missing on rank 2;" in found[0]


def engine_fingerprints(stage: int, bf16: bool) -> dict[str, str]:
    """Of a fresh SEFT engine, slots included."""
    import seft_ds

    model = tiny_model("qwen2", torch.bfloat16 if bf16 else torch.float32)
    engine, *_ = seft_ds.initialize(model=model, config=config(stage, bf16))
    return model_fingerprints(dict(engine.module.named_parameters()), engine.seft.ranks)


def mixed_fingerprints() -> tuple[dict[str, str], list[bool]]:
    """Of a layer under zero.Init beside one that was made outside."""
    import deepspeed

    from seft_ds.distributed.collectives import init_ranks
    from seft_ds.zero import shards

    ranks = init_ranks()
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        inside = nn.Linear(5, 7)
    model = nn.ModuleDict({"inside": inside, "outside": nn.Linear(7, 3)})
    named = dict(model.named_parameters())
    return model_fingerprints(named, ranks), [shards.is_partitioned(p) for p in named.values()]


def in_processes() -> dict:
    found: dict = {(s, b): engine_fingerprints(s, b) for s in STAGES for b in (False, True)}
    found["mixed"] = mixed_fingerprints()
    return found


def slow_fingerprints(model: nn.Module) -> dict[str, str]:
    named = {n: p.data.reshape(-1) for n, p in model.named_parameters()}
    return {n: f"{slow_fingerprint(values, 0):016x}" for n, values in named.items()}


def test_engines_of_all_stages_and_rank_counts() -> None:
    # Before the processes, which so inherit transformers.
    loaded = {
        bf16: slow_fingerprints(tiny_model("qwen2", torch.bfloat16 if bf16 else torch.float32))
        for bf16 in (False, True)
    }
    runs = {size: run_processes(size, in_processes) for size in (1, 2, 3)}
    first = runs[1][0]
    for size, found in runs.items():
        assert all(each == first for each in found), size
    for bf16, wanted in loaded.items():
        assert all(first[s, bf16] == first[0, bf16] for s in STAGES)
        assert wanted.items() <= first[0, bf16].items()  # it has the weights that were loaded
        assert any(name.endswith("seft_delta") for name in first[0, bf16])
    torch.manual_seed(0)
    model = nn.ModuleDict({"inside": nn.Linear(5, 7), "outside": nn.Linear(7, 3)})
    assert first["mixed"] == (slow_fingerprints(model), [True, True, False, False])
