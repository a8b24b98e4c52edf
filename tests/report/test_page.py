"""The page stands alone, says what the journal says, and copes with little and with much."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from seft_ds.report.card import base_name, model_card, write_model_card
from seft_ds.report.facts import facts_of
from seft_ds.report.journal import Journal
from seft_ds.report.page import duration, page, size_text, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class _Page(HTMLParser):
    """Collects tags, ids, text and what an element would load; checks that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.texts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            self.loads += [value] if name in LOADING else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def _records(layers=2, steps=40, off=0, model="org/base"):
    names = [
        f"model.layers.{x}.{p}" for x in range(layers) for p in ("self_attn.q_proj", "mlp.up_proj")
    ]
    targets = [{"name": n, "shape": [4, 5], "live": 10, "slots": 2} for n in names]
    records = [
        {
            "kind": "run",
            "model": model,
            "ranks": 2,
            "zero_stage": 3,
            "dtype": "bfloat16",
            "command": "deepspeed launch/finetune.py",
            "config": {"seft": {"interval": 10}},
            "targets": targets,
            "versions": {"torch": "2.13.0"},
        }
    ]
    for step in range(1, steps + 1):
        records.append(
            {"kind": "step", "step": step, "loss": 3 - step / 50, "seconds": 2.0, "tokens": 100}
        )
        if step % 10 == 0:
            for n in names:
                records.append(
                    {
                        "kind": "event",
                        "step": step,
                        "target": n,
                        "dropped": 2,
                        "grown": 2,
                        "kept": 0,
                        "revived": 1,
                        "died": 0,
                        "folded": 2,
                        "pruned": 1,
                        "live": 10 + off,
                        "target_live": 10,
                        "slots": 2,
                        "seconds": 0.25,
                        "bytes": 1024,
                    }
                )
            records.append(
                {"kind": "fresh", "step": step + 1, "largest_update": 1e-3, "learning_rate": 1e-3}
            )
            records.append(
                {"kind": "eval", "step": step, "name": "perplexity", "value": 20 - step / 10}
            )
    live = len(names) * 10
    records.append(
        {"kind": "end", "step": steps, "seconds": 80.0, "live": live, "target_live": live}
    )
    return records


def _parsed(records):
    text = page(facts_of(records), "my run")
    return text, _Page(text)


def test_headline_figures_and_sections_of_a_whole_run():
    text, parsed = _parsed(_records())
    assert text.count("<svg") == 6
    for fact in (
        "org/base",
        "Sparsity 50.000 % of 80 target weights",
        "Live count exact yes 40 of 40, after every event too",
        "Training loss 2.98 → 2.2 step 1 to 40",
        "perplexity 19 → 16",
        "Time 1 min 20 s 40 steps, 50 tokens/s",
        "Time in events 5.0 % 4 s, 16 events",
        "Traffic of events 16 KiB",
        "2 ranks ZeRO-3, bfloat16",
        "above the line in 0 of 4",
        "deepspeed launch/finetune.py",
        '"interval": 10',
    ):
        assert fact in parsed.text, fact


def test_it_loads_nothing_and_runs_nothing():
    text, parsed = _parsed(_records())
    icon = "data:,"  # empty: without it a browser asks the server for one
    assert parsed.loads.count(icon) == 1 == parsed.tags.count("link")
    assert all(link.startswith("#") for link in parsed.loads if link != icon)
    assert "script" not in parsed.tags and "img" not in parsed.tags
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1] and "script-src" not in policy[1]
    assert not re.search(r"\son[a-z]+=", text)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_resolve():
    text, parsed = _parsed(_records())
    assert len(parsed.ids) == len(set(parsed.ids)) > 50
    used = {link[1:] for link in parsed.loads if link != "data:,"} | set(
        re.findall(r"url\(#([^)]*)\)", text)
    )
    assert used <= set(parsed.ids)


def test_colours_follow_the_page():
    text, _ = _parsed(_records())
    assert "prefers-color-scheme: dark" in text and "var(--c1)" in text and "currentColor" in text
    in_figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", in_figures)


def test_a_live_count_that_is_off_is_called_so():
    _, parsed = _parsed(_records(off=1))
    assert "Live count exact no 40 of 40; 4 steps off" in parsed.text
    assert "up to 1 weights off" in parsed.text


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"kind": "run"}],
        _records()[:1],
        _records()[:2],
        _records(steps=9),
        [r for r in _records() if r["kind"] != "run"],
        [r for r in _records() if r["kind"] in ("run", "event")],
    ],
    ids=["empty", "bare run", "run only", "one step", "no events", "no run", "events only"],
)
def test_little_to_tell_still_makes_a_page(records):
    _, parsed = _parsed(records)
    assert "How it was run" in parsed.text
    if not any(r["kind"] == "event" for r in records):
        assert "No event took place" in parsed.text


def test_five_hundred_targets_and_many_steps_stay_small():
    text, parsed = _parsed(_records(layers=250, steps=4000))
    assert "All 500 tensors" in parsed.text
    assert len(text) < 2_000_000


def test_text_from_the_journal_is_escaped():
    evil = "<script>alert(1)</script>&\"'"
    records = _records(model=evil)
    records[0] |= {"command": evil, "dtype": evil, "config": {evil: evil}, "versions": {evil: evil}}
    records += [{"kind": "eval", "step": 5, "name": evil + " $x_{", "value": 1.0}]
    records += [{"kind": "event", "step": 9, "target": f"l.0.{evil}", "live": 1, "target_live": 1}]
    records[0]["targets"] += [{"name": f"l.0.{evil}", "shape": [1, 1], "live": 1}]
    text, parsed = _parsed(records)
    assert "script" not in parsed.tags and "<script" not in text
    assert parsed.text.count("alert(1)") >= 8


def test_write_report_reads_the_journal_of_the_directory(tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        for record in _records():
            journal.write(**record)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text() == page(facts_of(_records()), tmp_path.name)
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_quantities_are_written_for_people():
    assert [duration(s) for s in (1.234, 59, 200, 7500)] == [
        "1.23 s",
        "59 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert [size_text(b) for b in (12, 2048, 3 * 2**20, 5 * 2**30)] == [
        "12 B",
        "2 KiB",
        "3 MiB",
        "5 GiB",
    ]


SPARSITY = {
    "pattern": "2:4",
    "live": 12,
    "total": 24,
    "sparsity": 0.5,
    "method": "wanda",
    "base_model": "org/base-v1",
    "targets": {
        "model.layers.0.mlp.up_proj.weight": {"shape": [3, 4], "live": 6},
        "model.layers.1.mlp.up_proj.weight": {"shape": [3, 4], "live": 6},
    },
}


def test_model_card_has_valid_front_matter_and_the_counts(tmp_path):
    yaml = pytest.importorskip("yaml")
    path = write_model_card(tmp_path, SPARSITY, facts_of(_records()))
    assert path == tmp_path / "README.md"
    _, front, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base-v1",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse", "seft"],
    }
    assert "| `mlp.up_proj` | 2 | 24 | 12 | 50.00 % |" in body
    assert "pruned by wanda" in body and "from_pretrained" in body
    assert "16 evolution events" in body
    assert "| perplexity | 19 (step 10) | 16 (step 40) |" in body
    assert "Fine-tuning" not in model_card(SPARSITY, None, "x")
    more = {
        "base_model": "pruned",
        "license": {"license": "apache-2.0"},
        "pruning": {"method": "wanda"},
    }
    text = model_card(SPARSITY | more, None, "x")
    assert "base_model" not in text and "of `pruned`" in text, "a folder is no name on a hub"
    assert 'license: "apache-2.0"' in text and "## Pruning\n\nmethod wanda." in text


def test_model_card_has_what_was_measured_of_the_model(tmp_path):
    yaml = pytest.importorskip("yaml")
    results = {
        "perplexity": {"text_file": "held|out.txt", "perplexity": 40.526, "tokens": 5},
        "tasks": {
            "results": {
                "arc_easy": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01},
                "gsm8k": {"exact_match,strict-match": 0.5, "sample_len": 10},
            },
            "n-samples": {"arc_easy": {"original": 2376, "effective": 6}},
        },
    }
    old = {"perplexity": {"text_file": "held|out.txt", "perplexity": 137.19}}
    results["perplexity"] |= {"windows": 40, "window_tokens": 512}
    old["perplexity"] |= {"windows": 40, "window_tokens": 512}
    nothing = {"tasks": [1], "perplexity": None}
    path = write_model_card(tmp_path, SPARSITY, None, [results, nothing], [old])
    _, front, body = path.read_text().split("---\n", 2)
    assert "| held\\|out.txt | perplexity | 137.2 | 40.53 | 40 windows of 512 tokens |" in body
    assert "| arc_easy | acc |  | 0.25 ± 0.01 | the first 6 of 2,376 documents |" in body
    assert "| gsm8k | exact_match (strict-match) |  | 0.5 |" in body and "sample_len" not in body
    index = yaml.safe_load(front)["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in index] == [40.526, 0.25, 0.5]
    assert index[1]["dataset"]["name"] == "arc_easy (the first 6 of 2,376 documents)"


def test_the_card_script_writes_card_and_report_anew(tmp_path, capsys):
    from launch import card

    (tmp_path / "results.json").write_text('{"perplexity": {"text_file": "t", "perplexity": 9.5}}')
    record = {"format": "seft_ds-sparsity-1", **SPARSITY}
    more = {"dtype": "float32", "pattern": "2:4", "target_live": 6, "mask_digest": "x"}
    record["targets"] = {n: {**t, **more} for n, t in SPARSITY["targets"].items()}
    (tmp_path / "sparsity.json").write_text(json.dumps(record))
    card.main([str(tmp_path), "--evaluation", str(tmp_path / "results.json")])
    assert not (tmp_path / "report.html").exists()
    with Journal(tmp_path / "journal.jsonl") as journal:
        for entry in _records():
            journal.write(**entry)
    card.main([str(tmp_path), "--evaluation", str(tmp_path / "results.json")])
    assert "| t | perplexity | 9.5 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "report.html").is_file() and "report.html" in capsys.readouterr().out
    (tmp_path / "results.json").write_text('{"model": "x"}')
    with pytest.raises(ValueError, match="nothing measured"):
        card.main([str(tmp_path), "--evaluation", str(tmp_path / "results.json")])


def test_a_path_as_base_model_keeps_only_its_last_part():
    assert base_name("org/model") == "org/model"
    assert base_name("/data/models/llama") == "llama"
    assert base_name("./llama") == "llama"
    assert base_name("a/b/c") == "c"
