"""A table of every causal language model of transformers: trained exactly by FPDT, or refused, and why.

    python scripts/docs/families.py --write docs/families.md     two minutes on two CPU cores, nothing is fetched
    python scripts/docs/families.py --only llama,qwen3           these families, printed

Ends with 1 where a model is trained wrong, or fails inside a step for a reason that it does not say.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import cast

import torch
import transformers
from family_trial import ERROR, EXACT, LATE, NOT_TRIED, REFUSED, VERDICTS, WRONG, Verdict, tried
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Children begin with torch and transformers imported.
FORK = get_context("fork")
COMMAND = "python scripts/docs/families.py --write docs/families.md"
# What stands in reasons and says nothing of a family.
OF_ONE_CLASS = (
    (r"^\w+Error: (?=.)", ""),
    (r"^hf_fpdt: ", ""),
    (r"^FPDT cannot run \w+: (?=.)", ""),
    (r"^layer \d+ \(\w+\) cannot be run in chunks: ", ""),
    (r"^layer \d+ \(\w+\)", "a layer"),
    (r'^attn_implementation="fpdt"( in \w+)?: ', ""),
    (r' Otherwise choose "sdpa" or "eager".$', ""),
    (r" of shape \([\d, ]+\)", ""),
    (r"^the forward of \w+", "its forward"),
    (r" You can install it.*(?=\)$)", ""),
)
ABOUT = """\
# Model families

Every causal language model of transformers {version}, by model type, on a CPU with torch {torch}: {counts}.

    {command}

Of each a tiny model is made from its default configuration (few layers, small sizes, windows of 40 tokens at most,
dropout off) with random weights. It trains one step of 53 tokens plainly and one with FPDT in chunks of 8; loss and
every gradient are compared in float64, transformers' own casts to fp32 left out. FPDT knows no family by name: the
model and its configuration decide, so **a checkpoint may differ from its family's default**, by a window, by other
kinds of layers, by dropout. `hf-fpdt check NAME` asks your checkpoint, prints every reason (here is the first), and
compares on your machine.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    families = _families(options.only)
    verdicts = sorted(_all_tried(families, options.jobs), key=lambda verdict: verdict.family)
    if options.json is not None:
        rows = {"transformers": transformers.__version__, "families": [asdict(verdict) for verdict in verdicts]}
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        options.write.write_text(table(verdicts), encoding="utf-8")
    print(_counts(verdicts))
    return 1 if any(v.verdict in (WRONG, ERROR) for v in verdicts) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for programs")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="FAMILIES", help="model types, by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    return parser


def _families(only: Sequence[str] | None) -> dict[str, str]:
    """Class by model type."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if unknown := sorted(set(only or ()) - set(names)):
        raise SystemExit(f"--only: transformers {transformers.__version__} has no causal {', '.join(unknown)}.")
    return {family: str(names[family]) for family in (only or names)}


def _all_tried(families: dict[str, str], jobs: int) -> Iterator[Verdict]:
    """As they end, each in a process of its own: what a model does there ends nothing but that."""
    waiting, began = list(families.items()), time.perf_counter()
    running: dict[Connection, tuple[tuple[str, str], ForkProcess]] = {}
    for count in range(1, len(families) + 1):
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_send, args=(sender, *family))
            process.start()
            sender.close()
            running[receiver] = family, process
        receiver = cast(Connection, wait(list(running))[0])
        family, process = running.pop(receiver)
        try:
            verdict = receiver.recv()
        except EOFError:
            process.join()
            verdict = Verdict(*family, NOT_TRIED, (f"its process ended with {process.exitcode}",))
        process.join()
        _report(f"[{count}/{len(families)}, {time.perf_counter() - began:.0f} s]", verdict)
        yield verdict


def _send(sender: Connection, family: str, architecture: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    sender.send(tried(family, architecture))


def _report(place: str, verdict: Verdict) -> None:
    said = f"{verdict.error:.0e} in {verdict.how}" if verdict.verdict == EXACT else "; ".join(verdict.reasons)
    line = f"{place} {verdict.family} ({verdict.architecture}): {verdict.verdict}, {said}"
    print(line[:240], file=sys.stderr, flush=True)


# -- the table --------------------------------------------------------------------------------------------------------


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: exact, refused by reason, not tried; and what must not be, where it is."""
    of = {verdict: [v for v in verdicts if v.verdict == verdict] for verdict in VERDICTS}
    about = ABOUT.format(
        version=transformers.__version__, torch=torch.__version__, command=COMMAND, counts=_counts(verdicts)
    )
    parts = [about, _heading("Trained exactly", of[EXACT]), _exact_rows(of[EXACT])]
    parts += [_heading("Refused", of[REFUSED]), _refused_rows(of[REFUSED])]
    for verdict in (LATE, NOT_TRIED, WRONG, ERROR):
        if of[verdict]:
            parts += [_heading(verdict[0].upper() + verdict[1:], of[verdict]), _refused_rows(of[verdict])]
    return "\n".join(parts)


def _counts(verdicts: Sequence[Verdict]) -> str:
    counts = {verdict: sum(v.verdict == verdict for v in verdicts) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _heading(title: str, verdicts: Sequence[Verdict]) -> str:
    return f"## {title} ({len(verdicts)})\n"


def _exact_rows(verdicts: Sequence[Verdict]) -> str:
    lines = [
        "| model type | class | worst relative error | changed in the default configuration |",
        "|---|---|---|---|",
    ]
    for v in verdicts:
        notes = ", ".join(note for note in (v.settings, "" if v.how == "float64" else v.how) if note)
        lines.append(f"| `{v.family}` | `{v.architecture}` | {v.error:.0e} | {notes} |")
    return "\n".join([*lines, ""])


def _refused_rows(verdicts: Sequence[Verdict]) -> str:
    """A row for each first reason, the one with the most families first."""
    families: dict[str, list[str]] = {}
    for v in verdicts:
        families.setdefault(_general(v.reasons[0]), []).append(f"`{v.family}`")
    rows = sorted(families.items(), key=lambda row: (-len(row[1]), row[0]))
    lines = ["| because | model types |", "|---|---|"]
    return "\n".join([*lines, *(f"| {reason} | {', '.join(names)} |" for reason, names in rows), ""])


def _general(reason: str) -> str:
    """Without what is the tiny model's or one class's own."""
    for pattern, instead in OF_ONE_CLASS:
        reason = re.sub(pattern, instead, reason)
    return reason.replace("|", "\\|").rstrip(".")


if __name__ == "__main__":
    raise SystemExit(main())
