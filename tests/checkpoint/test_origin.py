"""What a record says of where a model comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seft_ds.checkpoint.origin import hub_name, origin_of


def test_names_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = "/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f2"
    assert hub_name(cached) == "meta-llama/Llama-3.1-8B"
    assert hub_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert not any(map(hub_name, ["pruned", "/data/pruned", "./runs/pruned", "a/b/c", "", "~/x"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/pruned").mkdir(parents=True)
    assert hub_name("runs/pruned") is None, "a folder here"


def test_what_is_handed_on_from_the_source(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "pruned") == {"base_model": "pruned"}
    pruning = {"method": "wanda", "sparsity": 0.6}
    record = {"base_model": "org/dense", "pruning": pruning, "license": {"license": "mit"}}
    (tmp_path / "sparsity.json").write_text(json.dumps(record))
    assert origin_of(tmp_path) == record
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n# x\n")
    licence = {"license": "llama3.1", "license_link": "LICENSE"}
    assert origin_of(tmp_path) == record | {"license": licence}
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    (tmp_path / "sparsity.json").write_text("{")
    assert origin_of(tmp_path) == {"base_model": tmp_path.name}
