"""What reading data left out: how much of each kind, and the first case, for the log and for run.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Skipped:
    """Counts by kind, each with its first case; files that are not read are told apart by how their names end."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    other_files: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, case: str) -> None:
        """One more of `kind`, a plural with what was done; the first case is kept as its example."""
        self.counts[kind] += 1
        self.first.setdefault(kind, case)

    def add_other_file(self, suffix: str) -> None:
        """A file of a folder whose kind is not read."""
        self.other_files[suffix or "no ending"] += 1

    def lines(self) -> list[str]:
        """One line a kind; none where nothing was left out."""
        lines = [f"{kind}: {count}, the first: {self.first[kind]}" for kind, count in self.counts.items()]
        if self.other_files:
            tally = ", ".join(f"{suffix} {count}" for suffix, count in self.other_files.most_common(8))
            more = ", ..." if len(self.other_files) > 8 else ""
            lines.append(f"files of other kinds left out: {sum(self.other_files.values())} ({tally}{more})")
        return lines
