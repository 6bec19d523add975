"""What a reader of a run needs: run.json, the curve as csv and figure, the card, the table on the screen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from ...config import FPDTPlugin
from ...model import weight_count
from ..conditions import hardware_facts, version_facts
from ..eval.curves import Curve, table_lines, write_csv
from ..eval.figure import draw
from ..options import tokens_text
from ..pictures import PictureError
from .card import command_line, write_card
from .data import Data
from .options import Options
from .quantise import compute_dtype
from .rope import RopePlan
from .steps import Progress, StepPrinter

PACKAGES = ("hf_fpdt", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


@dataclass(frozen=True)
class Outcome:
    """A run when it is over, but for its weights."""

    options: Options
    rope: RopePlan
    data: Data
    progress: Progress
    curves: list[Curve]
    steps: StepPrinter


def collect_facts(outcome: Outcome, model: nn.Module) -> dict[str, Any]:
    """The content of run.json: options, data, losses, timing, hardware, versions."""
    options, steps = outcome.options, outcome.steps
    plugin = {field.name: getattr(options.plugin, field.name) for field in fields(FPDTPlugin)}
    return {
        "command": command_line(options.words),
        "arguments": {**options.own(), **plugin, "compute_dtype": str(compute_dtype(options)).removeprefix("torch.")},
        "trainer": options.trainer.to_dict(),
        "rope": asdict(outcome.rope),
        "data": outcome.data.facts,
        "parameters": weight_count(model),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "held_out_loss": {curve.label: curve.mean_loss for curve in outcome.curves},
        "steps": steps.global_step,
        "training_losses": steps.losses,
        "evaluation_losses": steps.eval_losses,
        "step_seconds": [round(seconds, 3) for seconds in steps.seconds],
        "training_tokens_per_s": steps.tokens_per_s,
        "phase_seconds": {name: round(seconds, 2) for name, seconds in outcome.progress.phase_seconds.items()},
        "processes": PartialState().num_processes,
        "hardware": hardware_facts(on_gpu=options.device == "cuda"),
        "versions": version_facts(PACKAGES),
    }


def report(outcome: Outcome, model: nn.Module) -> None:
    """Write and print it; the picture alone may be missing."""
    options, pretrained_tokens = outcome.options, outcome.rope.pretrained_tokens
    output = Path(options.trainer.output_dir)
    table = table_lines(outcome.curves, pretrained_tokens)
    facts = collect_facts(outcome, model)
    (output / "run.json").write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    write_csv(output / "loss_by_position.csv", outcome.curves)
    reached = tokens_text(outcome.data.facts["longest_window_tokens"])
    title = f"Loss by position: {Path(options.model).name} extended to {reached} tokens"
    picture = output / "loss_by_position.png"
    try:
        draw(picture, outcome.curves, pretrained_tokens, title)
    except PictureError as error:
        outcome.progress.say(f"no loss_by_position.png: {error}")
    write_card(output / "README.md", facts, "\n".join(table), picture.name if picture.is_file() else None)
    print("\nHeld-out loss by position (nats a token):\n", *table, sep="\n")
    outcome.progress.say(f"wrote the weights, README.md, loss_by_position.csv and run.json to {output}")
