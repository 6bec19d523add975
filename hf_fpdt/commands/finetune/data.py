"""From sources to windows: what is trained on, what is held out, and how much of each there is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset

from ..options import UserMistake, tokens_text
from .options import Options
from .sources import read_documents
from .steps import Progress
from .windows import (
    WindowDataset,
    document_tokens,
    hold_out,
    plan_eval_windows,
    plan_windows,
    teaches,
    tokenise,
    window_tokens,
    with_something_to_learn,
    without_held_out_texts,
)


@dataclass(frozen=True)
class Data:
    """Training and evaluation windows, and what the card says about them."""

    training: WindowDataset
    evaluation: WindowDataset
    facts: dict[str, Any]


def prepare_data(options: Options, tokenizer: Any, progress: Progress, ids: int) -> Data:
    """Read, hold out, tokenise and plan the windows; says how much of each there is.

    The model knows `ids` token ids.
    """
    documents, held_out, left_out = _documents(options, progress)
    progress.say(f"tokenising {len(documents)} training and {len(held_out)} held-out documents")
    training, evaluation = (
        _learnable(tokenise(each, tokenizer, f"{what} documents", ids), what, left_out, progress)
        for each, what in ((documents, "training"), (held_out, "held-out"))
    )
    lengths, eval_lengths = document_tokens(training), document_tokens(evaluation)
    taught = partial(teaches, training)
    windows, counts = plan_windows(lengths, options.max_length, options.long_documents, taught)
    if "labels" in training.column_names and (silent := sum(lengths) - counts.dropped_tokens - counts.tokens):
        left_out.append(
            f"tokens left out of conversations that were cut, in pieces in which no assistant speaks: {silent}"
        )
        progress.say(left_out[-1])
    eval_windows = plan_eval_windows(eval_lengths, options.max_length, options.eval_docs, options.eval_windows)
    if not windows and counts.dropped:
        raise UserMistake(
            f"--max_length: all {counts.dropped} training documents are longer than {options.max_length:,} tokens; "
            "give a larger one, or --long_documents cut"
        )
    if not windows or window_tokens(eval_windows[0]) < 2:
        raise UserMistake("data: fewer than two tokens in the training or the held-out documents; give longer ones")
    facts = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "windows": len(windows),
        # What was read in one piece: documents side by side in a window do not see one another.
        "longest_window_tokens": max(window_tokens((piece,)) for window in windows for piece in window),
        "trained_tokens": counts.tokens,
        "filled": round(counts.filled, 4),
        "dropped_documents": counts.dropped,
        "dropped_tokens": counts.dropped_tokens,
        "cut_documents": counts.cut,
        "held_out_documents": len(eval_lengths),
        "eval_documents": sorted({evaluation[window[0].document]["name"] for window in eval_windows}),
        "eval_windows": len(eval_windows),
        "eval_length_tokens": window_tokens(eval_windows[0]),
        "left_out": left_out,
    }
    progress.say(_data_line(facts, options))
    length = max(map(window_tokens, windows))
    filled = WindowDataset(training, windows, filled_to=length, pad_id=tokenizer.eos_token_id)
    return Data(filled, WindowDataset(evaluation, eval_windows), facts)


def _learnable(tokenised: Dataset, what: str, left_out: list[str], progress: Progress) -> Dataset:
    kept = with_something_to_learn(tokenised)
    if missing := len(tokenised) - len(kept):
        left_out.append(f"{what} conversations left out in which no assistant speaks: {missing}")
        progress.say(left_out[-1])
    if not len(kept):
        raise UserMistake(f"data: no assistant speaks in any of the {what} conversations; give some in which one does")
    return kept


def _documents(options: Options, progress: Progress) -> tuple[Dataset, Dataset, list[str]]:
    """(training, held out, what was left out); held-out sources first, for a mistake in them costs little there."""
    left_out: list[str] = []

    def say(line: str) -> None:
        left_out.append(line)
        progress.say(line)

    def read(sources: list[str]) -> Dataset:
        progress.say(f"reading {', '.join(sources)}")
        return read_documents(sources, options.text_column, options.broken_lines, say)

    if options.eval_data:
        held_out, documents = read(options.eval_data), read(options.data)
    else:
        documents, held_out = hold_out(read(options.data), options.eval_fraction, options.trainer.seed)
    training = without_held_out_texts(documents, held_out)
    if copies := len(documents) - len(training):
        say(f"training documents left out that are held out too: {copies}")
    return training, held_out, left_out


def _data_line(facts: dict[str, Any], options: Options) -> str:
    short = "" if facts["eval_length_tokens"] == options.max_length else ": no held-out document is longer"
    longest = facts["longest_window_tokens"]
    few = "" if longest == options.max_length else f", the longest document in them has {longest:,} tokens"
    return (
        f"{facts['documents']} training documents, {facts['tokens']:,} tokens, {facts['windows']} windows of "
        f"{tokens_text(options.max_length)}, {100 * facts['filled']:.1f} % filled{few}; {_long_text(facts)}; "
        f"held out: "
        f"{facts['held_out_documents']} documents, {facts['eval_windows']} windows of "
        f"{tokens_text(facts['eval_length_tokens'])}{short}"
    )


def _long_text(facts: dict[str, Any]) -> str:
    """What became of documents longer than a window."""
    if count := facts["dropped_documents"]:
        share = 100 * facts["dropped_tokens"] / facts["tokens"]
        return f"left out {count} longer ones ({share:.1f} % of the tokens; --long_documents cut takes them in pieces)"
    return f"cut {facts['cut_documents']} longer ones" if facts["cut_documents"] else "none is longer"
