"""What counts in the loss is shown, and texts that share a row don't see each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from seft_ds.train.sample import check_packing, check_template, marked
from tests.prune.models import WORDS, tiny_model, tiny_tokenizer


def test_stretches_that_count_are_marked() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(" ".join(WORDS[:6]))["input_ids"]
    labels = [-100, -100, *ids[2:5], -100]
    words = [tokenizer.decode([i]) for i in ids]
    shown = marked(ids, labels, tokenizer)
    assert shown.count("⟦") == 1 and shown.replace(" ", "") == "".join(
        [*words[:2], "⟦", *words[2:5], "⟧", words[5]]
    )
    long = marked(ids * 200, ids * 200, tokenizer)
    assert " ... " in long and len(long) < 300


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_texts_of_a_row_do_not_see_each_other(attention: str, strategy: str) -> None:
    """Logits of a packed row against those of each text alone; `wrapped` is what contamination looks like."""
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    texts = [list(range(3, 12)), list(range(20, 26)), list(range(30, 35))]
    rows = Dataset.from_dict({"input_ids": texts, "labels": texts})
    packed = pack_dataset(rows, 32, strategy)
    assert len(packed) == 1
    apart = strategy != "wrapped"
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=apart)([packed[0]])
    with torch.no_grad():
        # With a cache transformers would not look for the starts of texts; training has none.
        together = model(**batch, use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([text])).logits[0] for text in texts]
    worst = float((together - torch.cat(alone)).abs().max())
    assert worst < 1e-4 if apart else worst > 1e-2


@pytest.mark.parametrize(
    "packing, strategy, attention, said",
    [
        (False, "bfd", "unknown", "one text a row"),
        (True, "wrapped", "sdpa", "sees the end of the one before"),
        (True, "bfd", "sdpa", "none sees another"),
        (True, "bfd_split", "kernels-community/flash-attn3", "none sees another"),
    ],
)
def test_how_texts_share_a_row(packing: bool, strategy: str, attention: str, said: str) -> None:
    run = SimpleNamespace(packing=packing, packing_strategy=strategy, padding_free=False)
    assert said in check_packing(run, attention)


def test_what_no_tokenizer_can_write() -> None:
    tokenizer = tiny_tokenizer()
    packed = SimpleNamespace(packing=True, packing_strategy="bfd", padding_free=False)
    with pytest.raises(ValueError, match="would see each other"):
        check_packing(packed, "paged_attention")
    run = SimpleNamespace(chat_template_path=None, assistant_only_loss=False)
    chats = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="--chat_template_path"):
        check_template(chats, tokenizer, run)
    run.assistant_only_loss = True
    with pytest.raises(ValueError, match="--assistant_only_loss is of messages"):
        check_template(Dataset.from_list([{"text": "a"}]), tokenizer, run)
    tokenizer.chat_template = "{{ messages }}"
    check_template(chats, tokenizer, run)
