"""A push as a hub sees it: a server on this machine that answers as the hub's API does."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from seft_ds.checkpoint.hub import files_to_push, push
from seft_ds.checkpoint.packing import pack
from tests.checkpoint.models import sparse_dir

ROOT = Path(__file__).resolve().parent.parent.parent


class Hub(HTTPServer):
    """Takes one repository; every file by the small files' way, in the commit itself."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.commits: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body))
            self._say({"url": "http://127.0.0.1/owner/name", "id": "1"})
        elif "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._say({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                record = json.loads(line)
                if record["key"] == "header":
                    self.server.commits.append(record["value"]["summary"])
                else:
                    content = base64.b64decode(record["value"]["content"])
                    self.server.files[record["value"]["path"]] = content
            where = f"http://127.0.0.1:{self.server.server_port}/owner/name/commit/abc"
            self._say({"success": True, "commitUrl": where, "commitOid": "a" * 40})
        else:
            self._say({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._say({"id": "owner/name", "sha": "b" * 40, "siblings": []})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def run_dir(tmp_path: Path) -> Path:
    model = sparse_dir(tmp_path)
    (model / "README.md").write_text("---\ntags:\n- sparse\n---\n# card\n")
    for name in (
        "journal.jsonl",
        "report.html",
        ".lock",
        "resolved_config.yaml",
        "train_results.json",
    ):
        (model / name).write_text("{}")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "state.json").write_text("{}")
    return model


OF_MODEL = {"README.md", "config.json", "model.safetensors", "sparsity.json", "tokenizer.json"}


def test_only_the_model_itself_is_pushed(tmp_path: Path) -> None:
    model = run_dir(tmp_path)
    names = set(files_to_push(model))
    assert names >= OF_MODEL
    away = {"journal.jsonl", "report.html", ".lock", "resolved_config.yaml", "train_results.json"}
    assert not names & away and not any("checkpoint" in n for n in names)
    assert set(files_to_push(model, with_report=True)) - names == {"report.html", "journal.jsonl"}
    pack(model, tmp_path / "packed")
    assert {"model.seftpack", "side/config.json", "manifest.json"} <= set(
        files_to_push(tmp_path / "packed")
    )


def test_what_does_not_hold_is_not_pushed(tmp_path: Path) -> None:
    model = run_dir(tmp_path)
    pack(model, tmp_path / "packed")
    record = json.loads((model / "sparsity.json").read_text())
    (model / "sparsity.json").write_text(json.dumps({**record, "live": 1}))
    for folder, file in (
        (model, None),
        (tmp_path / "packed", tmp_path / "packed/side/config.json"),
    ):
        if file is not None:
            file.write_text(file.read_text().replace("llama", "lhama"))
        with pytest.raises(ValueError, match="not pushed"):
            files_to_push(folder)
    with pytest.raises(ValueError, match="no sparsity.json"):
        push(tmp_path, "owner/name")


def test_a_push_arrives_in_one_commit(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    model, hub = run_dir(tmp_path), Hub()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, str(ROOT / "launch/push.py"), str(model), "--repo_id"]
    done = subprocess.run(
        [*command, "owner/name"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.commits == ["Sparse model"] and hub.made[0]["name"] == "name"
    assert set(hub.files) == set(files_to_push(model))
    for name, content in hub.files.items():
        assert content == (model / name).read_bytes(), name
    hub.shutdown()
    hub.server_close()
    gone = subprocess.run(
        [*command, "owner/name"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert gone.returncode == 1 and "was not pushed" in gone.stderr, gone.stderr[-2000:]
