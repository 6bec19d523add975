"""Writes the tables of README.md and the pages of benchmarks from docs/results/, and draws their pictures.

    python scripts/bench/publish.py           # tables and pictures
    python scripts/bench/publish.py --check   # exit status 1 where a table is not what its CSV says

A table lies between `<!-- bench NAME [columns=C,D] [steps=E,F] [stack=A,B] [result=ok] -->` and `<!-- end -->`; it is
that of docs/results/bench-NAME.csv, with docs/results/step-E.json, which long_step.py wrote, as more rows. Without
`columns` they are those for one GPU; a column's name keeps the rows that have one of its values. A table of steps
alone begins with `<!-- steps NAME NAME -->`. `<!-- reach NAME beside=OTHER tokens=N [steps=E] -->` has a line for each
stack: its longest step, of bench-NAME.csv, and its speed at N tokens, of bench-OTHER.csv.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_results import ROOT, Row, read, read_json, read_step

PAGES = ("README.md", "docs/benchmarks.md", "docs/results/benchmarks.md")
SEVERAL, LONGER = "several-h200", ("512k-4xh200", "1m-4xh200")
REACH = ("lora-8b-h100", "longest-8b-h100"), ("512k-h100", "768k-h100")
MARKER = re.compile(r"(<!-- (bench|steps|reach) ([\w-]+)([^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)
# Column of the CSV: heading, format.
COLUMNS = {
    "tokens": ("tokens", ","),
    "stack": ("stack", ""),
    "step_s": ("step s", ",.2f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "strict_mfu": ("strict MFU", ".3f"),
    "mfu_with_recompute": ("MFU with recompute", ".3f"),
    "of_ceiling": ("of ceiling", ".0%"),
    "peak_device_gib": ("GPU GiB", ".1f"),
    "pinned_host_gib": ("pinned GiB", ".1f"),
    "parity": ("error / plain HF's", ".2f"),
}
# Where they are asked for.
MORE_COLUMNS = {
    "gpus": ("GPUs", ","),
    "layers": ("layers", ","),
    "held_gib": ("held GiB", ".1f"),
    "chunk_tokens": ("chunk tokens", ","),
    "predicted_s": ("predicted s", ",.2f"),
    "of_ceiling_once": ("of ceiling, nothing twice", ".0%"),
    "predicted_device_gib": ("predicted GPU GiB", ".1f"),
}
# What a reader who knows none of the stacks calls them.
TITLES = {
    "hf": "Hugging Face, every layer checkpointed",
    "liger": "the same with Liger's kernels",
    "alst": "DeepSpeed's ALST",
    "hf-offload": "Transformers' offloaded checkpointing",
    "fpdt": "**hf_fpdt**",
}
STEP_HEADINGS = (
    "tokens",
    "model",
    "trained",
    "GPUs",
    "step s (predicted)",
    "tokens/s",
    "strict MFU",
    "GPU GiB (predicted)",
    "pinned GiB (predicted)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    check = parser.parse_args().check
    stale = [page for page in PAGES if publish(ROOT / page, check=check)]
    if not check:
        from bench_pictures import PICTURES, draw, draw_reach, draw_scaling  # matplotlib, for which a check has no use

        for name in PICTURES:
            draw(name, ROOT / f"docs/images/bench-{name}.png")
        draw_reach(*REACH, ROOT / "docs/images/reach-h100.png")
        draw_scaling(SEVERAL, LONGER, ROOT / f"docs/images/scaling-{SEVERAL.rpartition('-')[2]}.png")
    for page in stale:
        print(f"{page}: {'differs from the CSV files; run scripts/bench/publish.py' if check else 'written'}")
    sys.exit(bool(stale and check))


def publish(page: Path, *, check: bool) -> bool:
    """Whether a page's tables are not what the CSV files say; they are after it, unless `check`."""
    text = page.read_text(encoding="utf-8")
    new = MARKER.sub(lambda found: found[1] + filled(*found.group(2, 3, 4)) + found[5], text)
    if new != text and not check:
        page.write_text(new, encoding="utf-8")
    return new != text


def filled(kind: str, name: str, options: str) -> str:
    """What belongs between the marks."""
    if kind == "steps":
        return steps_table([name, *options.split()])
    return table(name, options) if kind == "bench" else reach_table(name, options)


def table(name: str, options: str) -> str:
    """The table of one CSV as Markdown."""
    wanted = options_of(options)
    columns = wanted.pop("columns", list(COLUMNS))
    rows = read(name) + [read_step(step) for step in wanted.pop("steps", [])]
    for column, values in wanted.items():
        rows = [row for row in rows if row[column] in values]
    lines = [[heading(column)[0] for column in columns], ["---"] * len(columns)]
    return markdown(lines + [cells(row, columns) for row in rows])


def options_of(text: str) -> dict[str, list[str]]:
    """Of a mark: `tokens=1,2` as {"tokens": ["1", "2"]}."""
    return {option: values.split(",") for option, values in re.findall(r"(\w+)=(\S+)", text)}


def reach_table(name: str, options: str) -> str:
    """How far each stack went, and how fast it is at one length."""
    wanted = options_of(options)
    rows = read(name) + [read_step(step) for step in wanted["steps"]]
    longest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: int(row["tokens"])):
        if row["result"] == "ok":
            longest[row["stack"]] = row
    (other,), (tokens,) = wanted["beside"], wanted["tokens"]
    beside = {row["stack"]: row for row in read(other) if row["tokens"] == tokens}
    lines = [["", "longest step, tokens", "its seconds", f"tokens/s at {int(tokens):,}"], ["---"] * 4]
    for stack, row in longest.items():
        lines.append([TITLES[stack], *cells(row, ["tokens", "step_s"]), *cells(beside[stack], ["tokens_per_s"])])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of a table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def heading(column: str) -> tuple[str, str]:
    """Of a column, with the format of its values."""
    return COLUMNS.get(column) or MORE_COLUMNS[column]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """One line; where there are no figures, why, in the first column that has none."""
    found = [cell(row[column], heading(column)[1]) for column in columns]
    if row["result"] != "ok":
        found[found.index("")] = row["result"].partition(":")[0]
    return found


def cell(value: str, form: str) -> str:
    if not value or not form:
        return f"`{value}`" if value else ""
    return format(int(value) if form == "," else float(value), form)


def steps_table(names: Sequence[str]) -> str:
    """Steps of `long_step.py`, a line each, as measured and as predicted before."""
    lines = [list(STEP_HEADINGS), ["---"] * len(STEP_HEADINGS)]
    return markdown(lines + [step_cells(read_json(name), read_step(name)) for name in names])


def step_cells(step: Mapping[str, Any], row: Row) -> list[str]:
    """One line of `steps_table`."""
    figure = {column: float(row[column]) for column in row if column not in ("stack", "result")}
    return [
        f"{figure['tokens']:,.0f}",
        of_model(step),
        step["trained"],
        step["gpus"],
        f"{figure['step_s']:,.1f} ({figure['predicted_s']:,.1f})",
        f"{figure['tokens_per_s']:,.0f}",
        f"{figure['strict_mfu']:.3f}",
        f"{figure['peak_device_gib']:.1f} ({figure['predicted_device_gib']:.1f})",
        f"{figure['pinned_host_gib']:.1f} ({figure['predicted_pinned_gib']:.1f})",
    ]


def of_model(step: Mapping[str, Any]) -> str:
    """The shape, and how many of its layers where they are not all."""
    return step["model"] + (f", {step['layers']} layers" if step["layers"] else "")


if __name__ == "__main__":
    main()
