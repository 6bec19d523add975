"""What is said while a run goes on: phases, and a line a step."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from accelerate import PartialState
from transformers import TrainerCallback


def quiet() -> None:
    """Bars redraw their line: in a file or a pipe they are noise beside the lines printed here."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    # PEFT still asks by the old name of a property; nothing a user of this command could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


@dataclass
class Progress:
    """Prints one line an event, with the seconds since the start, and remembers how long each phase took."""

    began: float = field(default_factory=time.monotonic)
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """From the first process alone: all of them do the same."""
        if PartialState().is_main_process:
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.monotonic() - began


class NothingLeftError(Exception):
    """The checkpoint that was gone on from is of the last step: it is loaded, and no step is to follow."""


class StepPrinter(TrainerCallback):
    """A line for each log of training steps (loss, learning rate, seconds, tokens a second) and of evaluations."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.losses: list[float] = []
        self.eval_losses: dict[int, float] = {}
        self.seconds: list[float] = []
        self.tokens = 0
        self.global_step = 0
        self._seen_before = 0
        self._logged = 0
        self._began = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Over all steps of this run; 0 where it made none, or Trainer counts no tokens."""
        return self.tokens / sum(self.seconds) if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After --resume the run's earlier steps count too; how often to save and evaluate is as given now."""
        self._seen_before = int(state.num_input_tokens_seen)
        self.global_step = int(state.global_step)
        self.losses = [float(log["loss"]) for log in state.log_history if "loss" in log]
        self.eval_losses = {log["step"]: float(log["eval_loss"]) for log in state.log_history if "eval_loss" in log}
        state.compute_steps(args, state.max_steps)
        if state.global_step >= state.max_steps:
            raise NothingLeftError  # Trainer would make one more

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self._began)
        self.global_step = int(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Also after several steps, where the user has asked for fewer logs."""
        if logs and "eval_loss" in logs:
            self.eval_losses[state.global_step] = float(logs["eval_loss"])
            self.say(f"evaluation after step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if not logs or "loss" not in logs:
            return
        step_tokens = int(state.num_input_tokens_seen) - self._seen_before - self.tokens
        self.tokens += step_tokens
        self.losses.append(float(logs["loss"]))
        seconds = sum(self.seconds[self._logged :])
        self._logged = len(self.seconds)
        speed = f", {step_tokens / seconds:,.0f} tokens/s" if step_tokens else ""
        self.say(
            f"training step {state.global_step} of {state.max_steps}: loss {self.losses[-1]:.4f}, "
            f"lr {logs['learning_rate']:.2e}, {seconds:.1f} s{speed}"
        )
