"""Conversations: what the assistant says is learnt and nothing else, whatever says which tokens those are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fpdt.commands.finetune import chat
from hf_fpdt.commands.finetune.chat import Conversations, conversation_of
from hf_fpdt.commands.finetune.sources import read_documents
from hf_fpdt.commands.finetune.windows import tokenise, with_something_to_learn
from hf_fpdt.commands.main import main
from hf_fpdt.commands.options import UserMistake
from tests.helpers.app_support import write_tiny_checkpoint
from tests.helpers.support import assert_rejects

SAID = "{{ message['content'] }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}[end]"
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}[end]{% endif %}{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['role'] == 'assistant' %}<BEGIN>"
    + SAID
    + "<STOP>{% else %}{{ message['content'] }}[end]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {
    "marked": TEMPLATE.replace("<BEGIN>", "{% generation %}").replace("<STOP>", "{% endgeneration %}"),
    "plain": TEMPLATE.replace("<BEGIN>", "").replace("<STOP>", ""),
}
# As Qwen3's: what was thought before the last turn is not shown any more.
FORGETS = TEMPLATES["plain"].replace("message['content'] }}{% if", "message['content'][loop.revindex0:] }}{% if")
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "read", "arguments": {"path": "a"}}}]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is in a"},
    {"role": "assistant", "content": "let me see", "tool_calls": CALL},
    {"role": "tool", "content": "line 3 of story"},
    {"role": "assistant", "content": "a story"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def tokenizer_of(folder: Path, template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer: Any, ids: list[int], labels: list[int]) -> list[str]:
    """Stretches of tokens that are learnt."""
    assert len(ids) == len(labels) and all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    found, stretch = [], list[int]()
    for token, label in [*zip(ids, labels, strict=True), (0, -100)]:
        if label != -100:
            stretch.append(token)
        elif stretch:
            found.append(tokenizer.decode(stretch))
            stretch = []
    return found


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_the_assistant_says_is_learnt(kind: str, folder: Path) -> None:
    tokenizer = tokenizer_of(folder, TEMPLATES[kind])
    text = conversation_of({"messages": MESSAGES, "tools": TOOLS}, "row 1")
    assert text is not None
    ids, labels = Conversations(tokenizer).tokens(text, "row 1")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False)

    def check(found: list[str]) -> None:
        assert found == [f"let me see{json.dumps(CALL)}[end]", "a story[end]"]

    check(learnt(tokenizer, ids, labels))
    moved = [-100, *labels[:-1]]
    broken = {
        "everything": [tokenizer.decode(ids)],
        "a token late": [tokenizer.decode([t for t, label in zip(ids, moved, strict=True) if label != -100])],
    }
    assert_rejects(check, broken)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_of_a_prompt_nothing_is_learnt(kind: str, folder: Path) -> None:
    tokenizer = tokenizer_of(folder, TEMPLATES[kind])
    conversations = Conversations(tokenizer)
    text = conversation_of({"prompt": MESSAGES[:4], "completion": MESSAGES[4:5]}, "row 1")
    assert text is not None and learnt(tokenizer, *conversations.tokens(text, "row 1")) == ["a story[end]"]
    text = conversation_of({"prompt": "line 1 of", "completion": " story number"}, "row 1")
    assert text is not None
    ids, labels = conversations.tokens(text, "row 1")
    assert learnt(tokenizer, ids, labels) == [f" story number{tokenizer.eos_token}"]
    assert tokenizer.decode(ids) == f"line 1 of story number{tokenizer.eos_token}"


def test_a_template_that_forgets_is_refused_unless_it_is_marked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = conversation_of({"messages": MESSAGES}, "row 1")
    assert text is not None
    with pytest.raises(UserMistake, match="document row 1: the chat template renders an earlier turn otherwise"):
        Conversations(tokenizer_of(folder, FORGETS)).tokens(text, "row 1")
    monkeypatch.setattr(chat, "_trls_template", lambda tokenizer: TEMPLATES["marked"])
    tokenizer = tokenizer_of(folder, FORGETS)
    assert learnt(tokenizer, *Conversations(tokenizer).tokens(text, "row 1"))[1] == "a story[end]"


def test_trls_marked_templates_are_found(folder: Path) -> None:
    templates = pytest.importorskip("trl.chat_template_utils")
    tokenizer = tokenizer_of(folder, templates.qwen3_chat_template)
    assert chat._trls_template(tokenizer) == templates.qwen3_training_chat_template
    assert chat._trls_template(tokenizer_of(folder, FORGETS)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "no list"}, "row 1, column 'messages' holds no list of messages"),
        ({"messages": []}, "holds no list of messages"),
        ({"messages": [{"content": "who?"}]}, "each with a role"),
        ({"prompt": MESSAGES, "completion": "text"}, "column 'completion' holds no list of messages"),
    ],
)
def test_what_is_no_conversation_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        conversation_of(fields, "row 1")


def test_templates_that_are_missing_or_refuse_are_named(folder: Path) -> None:
    text = conversation_of({"messages": MESSAGES}, "row 1")
    assert text is not None
    with pytest.raises(UserMistake, match="the tokenizer has no chat template.*--text_column"):
        Conversations(tokenizer_of(folder, None)).tokens(text, "row 1")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserMistake, match="document row 1: the chat template can't render it: .*must alternate"):
        Conversations(tokenizer_of(folder, strict)).tokens(text, "row 1")


def test_tables_of_conversations_are_read(folder: Path, tmp_path: Path) -> None:
    """As lists, as JSON in text, and as a table's structs, whose holes are filled with None; texts beside them."""
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": MESSAGES, "tools": TOOLS, "text": "not this"})
        + "\n"
        + json.dumps({"messages": json.dumps(MESSAGES), "tools": json.dumps(TOOLS), "name": "second"})
        + "\n"
    )
    Dataset.from_list([{"messages": MESSAGES[:2] + MESSAGES[4:]}, {"messages": MESSAGES[:2]}]).to_parquet(
        tmp_path / "b.parquet"
    )
    (tmp_path / "c.csv").write_text("prompt,completion\nline 1 of, story\n")
    (tmp_path / "d.txt").write_text("line 2 of story")
    documents = read_documents([str(tmp_path)], say=lambda line: None)
    assert documents["name"] == ["a.jsonl:1", "second", "b.parquet:1", "b.parquet:2", "c.csv:2", "d.txt"]
    assert documents["kind"] == ["chat"] * 5 + ["text"]
    assert documents["text"][0] == documents["text"][1]
    tokenizer = tokenizer_of(folder, TEMPLATES["plain"])
    rows = tokenise(documents, tokenizer, "texts")
    found = [learnt(tokenizer, list(row["input_ids"]), list(row["labels"])) for row in rows]
    end = tokenizer.eos_token
    assert found[2:] == [["a story[end]"], [], [f" story{end}"], [f"line 2 of story{end}"]]
    assert len(with_something_to_learn(rows)) == 5
    named = read_documents([str(tmp_path / "a.jsonl")], text_column="name", say=lambda line: None)
    assert named["text"] == ["second"] and named["kind"] == ["text"]


def test_a_step_on_conversations_has_the_loss_of_the_labels_of_each_alone(tmp_path: Path) -> None:
    """Packed in one row of the command, normalised over the labels of the whole step; a long one is left out."""
    model_folder = write_tiny_checkpoint(tmp_path / "model")
    tokenizer = tokenizer_of(model_folder, TEMPLATES["plain"])
    tokenizer.save_pretrained(model_folder)
    data, held_out = tmp_path / "chats.jsonl", tmp_path / "held_out.jsonl"
    rows = [{"messages": MESSAGES}, {"prompt": "line 1 of", "completion": " story number"}, {"messages": MESSAGES[:2]}]
    rows += [{"messages": [*MESSAGES[:2], {"role": "assistant", "content": "line 7 of story " * 90}]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps({"messages": MESSAGES[1:]}) + "\n")
    words = f"finetune --model {model_folder} --data {data} --eval_data {held_out} --max_length 256 --max_steps 1"
    words += f" --chunk_tokens 64 --lora_r 4 --use_cpu --output_dir {tmp_path / 'out'}"
    assert main(words.split()) == 0
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    kept = (facts["data"]["windows"], facts["data"]["dropped_documents"], facts["data"]["documents"])
    assert kept == (1, 1, 3) and any("no assistant speaks: 1" in line for line in facts["data"]["left_out"])
    stock, total, labels = AutoModelForCausalLM.from_pretrained(model_folder), 0.0, 0
    tokenised = tokenise(read_documents([str(data)], say=lambda line: None), tokenizer, "texts")
    for row in tokenised.select(range(2)):
        batch = {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "labels")}
        total += float(stock(**batch, num_items_in_batch=1).loss.detach())
        labels += int((batch["labels"] != -100).sum())

    def check(loss: float) -> None:
        assert facts["training_losses"][0] == pytest.approx(loss, abs=2e-4)

    check(total / labels)
    assert_rejects(check, {"a mean of means": total / labels + 1e-3, "every token": total / labels * 0.9})
