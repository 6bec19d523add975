"""Runs a command in a terminal and records what it shows: an asciinema file, and a picture of some of its moments.

    python scripts/record_terminal.py --cast step.cast --picture step.png --at 5 60 400 -- python train.py

The .cast plays with `asciinema play step.cast`. The picture shows the last lines of the screen at each moment, in
seconds since the start. Needs pyte (pip install pyte) for what a terminal does, and matplotlib for the picture.
"""

import argparse
import fcntl
import json
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COLUMNS, ROWS = 120, 30
SHOWN_ROWS = 4


@dataclass(frozen=True)
class Event:
    """Output of a command: seconds since its start, and the text."""

    seconds: float
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cast", type=Path, required=True, help="file to record into")
    parser.add_argument("--picture", type=Path, help="PNG of some moments")
    parser.add_argument("--at", type=float, nargs="+", default=[], metavar="SECONDS", help="the moments")
    parser.add_argument("command", nargs="*", help="after --; left out: draw what --cast has already")
    options = parser.parse_args()
    status = record(options.command, options.cast) if options.command else 0
    if options.picture is not None:
        draw(read(options.cast), options.at, options.picture)
    return status


def record(command: Sequence[str], path: Path) -> int:
    """Run a command in a terminal of its own, show and record it; its exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], list(command))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "command": " ".join(command)}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header) + "\n")
        for event in _output(terminal):
            sys.stdout.write(event.text)
            sys.stdout.flush()
            file.write(json.dumps([round(event.seconds, 3), "o", event.text]) + "\n")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _output(terminal: int) -> Iterator[Event]:
    began = time.monotonic()
    while True:
        try:
            data = os.read(terminal, 65_536)
        except OSError:  # Linux says so at the end
            return
        if not data:
            return
        yield Event(time.monotonic() - began, data.decode(errors="replace"))


def read(path: Path) -> list[Event]:
    """Events of a .cast file."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [Event(seconds, text) for seconds, _, text in map(json.loads, lines)]


def screen_at(events: Sequence[Event], seconds: float) -> list[str]:
    """The last lines on the screen that are not empty."""
    import pyte  # for pictures alone: where steps are recorded it need not be

    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    for event in events:
        if event.seconds <= seconds:
            stream.feed(event.text)
    lines = [line.rstrip() for line in screen.display]
    return [line for line in lines if line][-SHOWN_ROWS:]


def draw(events: Sequence[Event], moments: Sequence[float], path: Path) -> None:
    """A dark panel for each moment."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    height = 0.2 * (SHOWN_ROWS + 1)
    figure, panels = plt.subplots(len(moments), 1, figsize=(11, height * len(moments)), squeeze=False)
    for panel, moment in zip(panels[:, 0], moments, strict=True):
        text = "\n".join(screen_at(events, moment)).replace("$", r"\$")
        panel.set_facecolor("#1e1e1e")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(f"{moment:g} s", rotation=0, ha="right", va="center")
        panel.text(0.008, 0.5, text, family="monospace", fontsize=8, color="#d4d4d4", va="center")
    figure.tight_layout(h_pad=0.4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
