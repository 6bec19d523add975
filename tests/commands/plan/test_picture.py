"""The picture of a plan: it is written, and what is drawn is what it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_fpdt.commands.main import main
from hf_fpdt.commands.pictures import PictureError
from hf_fpdt.commands.plan import picture as plan_picture
from hf_fpdt.commands.plan.picture import _unit, draw_plan
from hf_fpdt.commands.plan.tables import USE_NAMES
from hf_fpdt.forecast.curves import Reach, memory_curve
from hf_fpdt.forecast.fit import Use, fit
from tests.commands.plan.test_plan import TINY
from tests.forecast.test_curves import CASES
from tests.helpers.app_support import run_python

REACH = [Reach(0.0, 300_000), Reach(48.0, 900_000), Reach(96.0, 1_500_000)]
LIMITS = {"device": 44.0, "host": 96.0}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that were saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def first_point(line: Line2D) -> tuple[float, float]:
    """As it was given, in the axes' units."""
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    return float(x[0]), float(y[0])


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_drawn_numbers_are_those_given(ending: str, tmp_path: Path, figures: list[Figure]) -> None:
    curve = memory_curve(fit(*CASES["on the host, K and V too"]), full=False)
    path = tmp_path / f"plan{ending}"
    draw_plan(path, "a title", curve, LIMITS, REACH, Reach(48.0, 524_288))
    assert path.stat().st_size > 5000
    device, host, reach = figures[0].axes
    unit = _unit(curve.seconds[-1])[0]
    assert device.get_xlim()[1] == pytest.approx(curve.seconds[-1] / unit)
    for axes, items in ((device, curve.device), (host, curve.host)):
        top = max(map(sum, zip(*items.values(), strict=True)))
        drawn = max(float(np.asarray(path.vertices)[:, 1].max()) for c in axes.collections for path in c.get_paths())
        assert drawn == pytest.approx(top, rel=0.01)
    line = np.asarray(reach.lines[0].get_xydata())
    assert [(x, round(y * 1024)) for x, y in line] == [tuple(point) for point in REACH]
    assert first_point(reach.lines[1]) == (48.0, 512.0)
    texts = " ".join(text.get_text() for axes in figures[0].axes for text in axes.texts)
    for part in ("available: 44.0 GiB", "available: 96.0 GiB", "pinned:", "set aside:", "524,288 tokens", "backward"):
        assert part in texts
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert "weights" in labels and all(
        USE_NAMES[use] in labels for use, values in curve.host.items() if max(values) > 0
    )


def test_everything_on_several_gpus_has_a_name_and_a_colour(tmp_path: Path, figures: list[Figure]) -> None:
    curve = memory_curve(fit(*CASES["two GPUs, every weight"]), full=True)
    draw_plan(tmp_path / "plan.png", "a title", curve, LIMITS, REACH, Reach(48.0, 524_288))
    assert "NCCL" in {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert set(plan_picture.COLOURS) == set(USE_NAMES) == set(Use)


def test_long_steps_have_larger_units() -> None:
    assert [_unit(seconds)[1] for seconds in (2, 179, 200, 4000, 20_000, 400_000)] == [
        "seconds",
        "seconds",
        "minutes",
        "minutes",
        "hours",
        "days",
    ]


def test_the_command_draws_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: list[Figure]) -> None:
    TINY.save_pretrained(tmp_path / "model")
    picture = tmp_path / "plan.png"
    arguments = ["plan", str(tmp_path / "model"), "--host-mem", "4", "--seq-len", "256K", "--gpu", "a100-40"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    said = capsys.readouterr()
    assert picture.exists() and f"picture: {picture}" in said.err and "262,144 tokens" in said.out
    assert first_point(figures[0].axes[2].lines[1]) == (4.0, 256.0)
    # Asserts play no part in it.
    without = run_python("-O", "-m", "hf_fpdt.commands.main", *arguments, "--plot", tmp_path / "without.png")
    assert without.returncode == 0 and without.stdout == said.out, without.stderr
    assert (tmp_path / "without.png").read_bytes() == picture.read_bytes()


def test_mistakes_end_before_anything_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in (("plan.txt", ".png, .svg, .pdf"), ("none/plan.png", "cannot be written")):
        assert main(["plan", "--host-mem", "128", "--plot", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err

    def missing() -> None:
        raise PictureError("matplotlib is not installed")

    monkeypatch.setattr("hf_fpdt.commands.plan.command.check_matplotlib", missing)
    assert main(["plan", "--host-mem", "128", "--plot", str(tmp_path / "plan.png")]) == 2
    assert "not installed" in capsys.readouterr().err
