"""Writes the tables of README.md and docs/benchmarks.md from docs/results/bench-*.csv, and draws their pictures.

    python scripts/bench/publish.py           # tables and pictures
    python scripts/bench/publish.py --check   # exit status 1 where a table is not what its CSV says

A table lies between `<!-- bench NAME [stacks=A,B] [columns=C,D] -->` and `<!-- end -->`; NAME is the CSV's, without
"bench-" and "-h100"; without columns they are those for one GPU. A picture compares the stacks of one CSV: tokens a
second, and memory of the GPU.
"""

import argparse
import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/benchmarks.md")
PICTURES = ("lora-8b", "full-1b")
MARKER = re.compile(r"(<!-- bench ([\w-]+)([^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)
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
# Where they are asked for, after those above; files from before there was one have no such column.
MORE_COLUMNS = {"gpus": ("GPUs", ",")}
FORMER = {"gpus": "1"}
# Column of the CSV: title, what a label counts in, its digits.
PANELS = (
    ("tokens_per_s", "thousand tokens a second", 1000, 1),
    ("peak_device_gib", "GPU memory, GiB", 1, 0),
)
Row = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    check = parser.parse_args().check
    stale = [page for page in PAGES if publish(ROOT / page, check=check)]
    if not check:
        for name in PICTURES:
            draw(name, ROOT / f"docs/images/bench-{name}-h100.png")
    for page in stale:
        print(f"{page}: {'differs from the CSV files; run scripts/bench/publish.py' if check else 'written'}")
    sys.exit(bool(stale and check))


def publish(page: Path, *, check: bool) -> bool:
    """Whether a page's tables are not what the CSV files say; they are after it, unless `check`."""
    text = page.read_text(encoding="utf-8")
    new = MARKER.sub(lambda found: found[1] + table(found[2], found[3]) + found[4], text)
    if new != text and not check:
        page.write_text(new, encoding="utf-8")
    return new != text


def table(name: str, options: str) -> str:
    """The table of one CSV as Markdown."""
    wanted = dict(re.findall(r"(\w+)=(\S+)", options))
    stacks, columns = wanted.get("stacks"), wanted.get("columns", ",".join(COLUMNS)).split(",")
    rows = [row for row in read(name) if stacks is None or row["stack"] in stacks.split(",")]
    lines = [[heading(column)[0] for column in columns], ["---"] * len(columns)]
    lines += [cells(row, columns) for row in rows]
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


def read(name: str) -> list[Row]:
    """Rows of a CSV."""
    with (ROOT / f"docs/results/bench-{name}-h100.csv").open(encoding="utf-8", newline="") as file:
        return [FORMER | row for row in csv.DictReader(file)]


def draw(name: str, path: Path) -> None:
    """Tokens a second and GPU memory, a group of bars a length, a bar a stack; a cross where it does not fit."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = read(name)
    lengths, stacks = sorted({int(row["tokens"]) for row in rows}), list(dict.fromkeys(row["stack"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    width = 0.8 / len(stacks)
    for panel, (column, title, unit, digits) in zip(panels, PANELS, strict=True):
        for i, stack in enumerate(stacks):
            mine = {int(row["tokens"]): row for row in rows if row["stack"] == stack}
            places = [lengths.index(n) + (i - (len(stacks) - 1) / 2) * width for n in mine]
            sizes = [float(row[column] or 0) for row in mine.values()]
            bars = panel.bar(
                places,
                [size / unit for size in sizes],
                width,
                label=stack,
                color=f"C{i}",
                alpha=1 if "fpdt" in stack else 0.6,
            )
            panel.bar_label(bars, [f"{size / unit:.{digits}f}" if size else "×" for size in sizes], fontsize=7)
        panel.set_xticks(range(len(lengths)), [f"{n // 1024}K tokens" for n in lengths])
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    facts = rows[0]
    figure.suptitle(f"{facts['model']}, {facts['layers']} layers, {facts['trained']}, {facts['gpu']}; × out of memory")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
