"""Loss at each position of held-out windows: is the far context readable, and is it used?

Position p is the loss of predicting token p from the p tokens before it (p = 1, 2, ...). The decoder runs once a
window; the head then runs on slices of the hidden states, so logits of the whole sequence never exist.

    python scripts/loss_by_position.py --model NAME --adapter FOLDER --eval-data FILE --max-length 64K --output FOLDER
"""

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from user_error import UserError, one_line, parse_tokens, run_main, tokens_text

from hf_fpdt import FPDTHandle
from hf_fpdt.comms import SequenceParallelGroup, own_tokens
from hf_fpdt.layout import ChunkPlan

LOGIT_SLICE_TOKENS = 1024
IGNORED_LABEL = -100
SECONDS_BETWEEN_REPORTS = 10.0


@dataclass(frozen=True)
class Curve:
    """Losses of one model state: [windows, positions], float32, on the CPU. Column 0 is position 1."""

    label: str
    losses: Tensor

    @property
    def mean_loss(self) -> float:
        """Mean over all predicted tokens."""
        return self.losses.double().mean().item()

    def between(self, first: int, stop: int) -> float:
        """Mean over the positions first .. stop - 1."""
        return self.losses[:, max(0, first - 1) : stop - 1].double().mean().item()


@dataclass(frozen=True)
class Cut:
    """How a window is shared by a sequence-parallel group: which tokens are this process's, and whose are the rest."""

    group: SequenceParallelGroup
    plan: Callable[[int], ChunkPlan]

    @classmethod
    def of(cls, handle: FPDTHandle, chunk_tokens: int) -> "Cut":
        """As the model behind `handle` takes its batches."""
        group = handle.group
        return cls(group, lambda n_tokens: ChunkPlan(n_tokens + -n_tokens % group.size, chunk_tokens, group.size))

    def own(self, input_ids_BS: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """This process's tokens with their positions, as the model takes them, and the token that follows each."""
        n_tokens = input_ids_BS.shape[1]
        plan = self.plan(n_tokens)
        positions = own_tokens(plan, self.group.rank, input_ids_BS.device)
        filled = F.pad(input_ids_BS, (0, plan.n_tokens - n_tokens))
        following = F.pad(input_ids_BS, (0, plan.n_tokens - n_tokens + 1), value=IGNORED_LABEL)[:, 1:]
        batch = {"input_ids": filled[:, positions], "position_ids": positions.expand(len(filled), -1)}
        return batch, following[:, positions]

    def whole(self, own_BS: Tensor, n_tokens: int) -> Tensor:
        """[B, n_tokens] from every process's tokens."""
        plan = self.plan(n_tokens)
        if self.group.size == 1:
            return own_BS[:, :n_tokens]
        parts = [torch.empty_like(own_BS) for _ in range(self.group.size)]
        torch.distributed.all_gather(parts, own_BS.contiguous(), group=self.group.process_group)
        whole_BS = own_BS.new_empty(len(own_BS), plan.n_tokens)
        for rank, part in enumerate(parts):
            whole_BS[:, own_tokens(plan, rank, part.device)] = part
        return whole_BS[:, :n_tokens]


WHOLE = Cut(SequenceParallelGroup(), lambda n_tokens: ChunkPlan(n_tokens, n_tokens))


def _hidden_and_logits(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states of every token and logits of the last, from one call of the model, wrapped or not."""
    causal_lm = _causal_lm(model)
    kept: list[Tensor] = []
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    hook = decoder.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    try:
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    return kept[0], logits


def _causal_lm(model: nn.Module) -> nn.Module:
    inner = model.module if hasattr(model, "module") else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@torch.no_grad()
def token_losses(
    model: nn.Module, input_ids_BS: Tensor, slice_tokens: int = LOGIT_SLICE_TOKENS, cut: Cut = WHOLE
) -> Tensor:
    """Cross entropy of every predicted token, [B, S - 1] in float32, from slices of at most slice_tokens logits."""
    batch, following_BS = cut.own(input_ids_BS)
    hidden_BSD, last_logits = _hidden_and_logits(model, batch)
    head = _causal_lm(model).get_output_embeddings()
    _check_head(head(hidden_BSD[:, -1:]), last_logits)
    losses = []
    for hidden, labels in zip(hidden_BSD.split(slice_tokens, 1), following_BS.split(slice_tokens, 1), strict=True):
        logits = head(hidden).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL))
    return cut.whole(torch.cat(losses, dim=1), input_ids_BS.shape[1])[:, :-1]


def _check_head(ours: Tensor, models: Tensor) -> None:
    """Refuse a model whose logits are not simply head(hidden states), such as one that scales or caps them."""
    if not torch.allclose(ours.float().log_softmax(-1), models.float().log_softmax(-1), rtol=2e-2, atol=2e-2):
        raise NotImplementedError(
            "loss by position: this model changes its logits after the head; it can't be sliced here"
        )


def measure(
    model: nn.Module,
    windows: Sequence[dict[str, Tensor]],
    label: str,
    report: Callable[[str], None] = print,
    cut: Cut = WHOLE,
) -> Curve:
    """The curve of one model state over equally long windows."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    reported = time.monotonic()
    for window in windows:
        rows.append(token_losses(model, window["input_ids"][None].to(device), cut=cut).float().cpu())
        if len(rows) == len(windows) or time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            report(f"evaluating {label}: window {len(rows)} of {len(windows)}, mean loss {torch.cat(rows).mean():.4f}")
    model.train(was_training)
    return Curve(label, torch.cat(rows))


def position_bins(length_tokens: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions, even in log2: octaves up to 256, where tokens are few, then half-octaves."""
    octaves = [1, 32, 64, 128]
    half_octaves = [round(256 * 2 ** (step / 2)) for step in range(2 * max(0, length_tokens.bit_length() - 8))]
    edges = [edge for edge in (*octaves, *half_octaves) if edge < length_tokens] + [length_tokens]
    return list(zip(edges[:-1], edges[1:], strict=True))


def octave_ranges(length_tokens: int, first_stop: int) -> list[tuple[int, int]]:
    """The rows of the table: up to the pre-training length, then one a doubling."""
    edges = [0, min(first_stop, length_tokens)]
    while edges[-1] < length_tokens:
        edges.append(min(length_tokens, 2 * edges[-1]))
    return list(zip(edges[:-1], edges[1:], strict=True))


def write_csv(path: Path, curves: Sequence[Curve]) -> None:
    """One row a bin: positions, tokens averaged, one loss a curve."""
    windows, positions = curves[0].losses.shape
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["first_position", "last_position", "tokens", *(curve.label for curve in curves)])
        for first, stop in position_bins(positions + 1):
            losses = [f"{curve.between(first, stop):.5f}" for curve in curves]
            rows.writerow([first, stop - 1, windows * (stop - first), *losses])


def table_lines(curves: Sequence[Curve], pretrained_tokens: int) -> list[str]:
    """The table of a terminal and of the model card, in Markdown."""
    head = ["positions", *(curve.label for curve in curves)]
    rows = []
    for first, stop in octave_ranges(curves[0].losses.shape[1] + 1, pretrained_tokens):
        span = f"{tokens_text(first) if first else '0'}–{tokens_text(stop)}"
        rows.append([span, *(f"{curve.between(first, stop):.3f}" for curve in curves)])
    rows.append(["all", *(f"{curve.mean_loss:.3f}" for curve in curves)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    cells = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub name or folder")
    parser.add_argument("--adapter", help="folder written by finetune.py; its config.json sets the rotary parameters")
    parser.add_argument("--eval-data", nargs="+", required=True, help="held-out documents, as for finetune.py --data")
    parser.add_argument("--text-column", default="text", help="of a dataset with columns (%(default)s)")
    parser.add_argument("--broken-lines", choices=["skip", "error"], default="skip", help="as for finetune.py")
    parser.add_argument("--max-length", default="8K", help="tokens of a window; K = 1,024, M = 1,048,576")
    parser.add_argument("--eval-windows", type=int, default=16, help="at most so many (%(default)s)")
    parser.add_argument("--chunk-tokens", default="auto", help="tokens of a chunk of FPDT")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (%(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the figure and the csv")
    return parser


def _windows_and_model(options: argparse.Namespace) -> tuple[list[dict[str, Tensor]], nn.Module]:
    """Every check that takes no time, then the data, and the weights last."""
    from base_model import check_weights, known_ids, load_config_and_tokenizer, load_weights, model_without_weights
    from finetune_options import make_folder
    from long_text import WindowDataset, document_tokens, plan_eval_windows, tokenise, window_tokens
    from text_sources import read_documents

    from hf_fpdt import FPDTPlugin, apply_fpdt

    length_tokens = parse_tokens("--max-length", options.max_length)
    if options.eval_windows < 1 or length_tokens < 2:
        raise UserError("--eval-windows, --max-length: allowed are at least 1 window of at least 2 tokens")
    chunk = options.chunk_tokens
    plugin = FPDTPlugin(chunk_tokens=chunk if chunk == "auto" else parse_tokens("--chunk-tokens", chunk))
    make_folder(options.output)
    config, tokenizer = load_config_and_tokenizer(options.model)
    config = _adapters_config(options.adapter) if options.adapter else config
    ids = known_ids(model_without_weights(options.model, config, plugin))
    check_weights(options.model, config)
    documents = read_documents(options.eval_data, options.text_column, options.broken_lines)
    tokenised = tokenise(documents, tokenizer, "held-out documents", ids)
    windows = plan_eval_windows(document_tokens(tokenised), length_tokens, len(documents), options.eval_windows)
    if window_tokens(windows[0]) < 2:
        raise UserError("data: fewer than two tokens in every held-out document; give longer documents")
    model = load_weights(options.model, getattr(torch, options.dtype), config)
    apply_fpdt(model, plugin)
    model = _with_adapter(model, options.adapter) if options.adapter else model
    rows = WindowDataset(tokenised, windows)
    return [rows[index] for index in range(len(rows))], model.to("cuda" if torch.cuda.is_available() else "cpu")


def _adapters_config(folder: str) -> Any:
    from peft import PeftConfig
    from transformers import AutoConfig

    try:
        PeftConfig.from_pretrained(folder)  # so that what is no adapter is found before weights are read
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"--adapter: {folder!r} has no readable config: {one_line(error)}; give a folder that finetune.py wrote"
        ) from error


def _with_adapter(model: nn.Module, folder: str) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(
            f"--adapter: {folder!r} can't be loaded: {one_line(error)}; give a folder that finetune.py wrote"
        ) from error


def main() -> None:
    """Measure one model, with or without an adapter; write the figure and the csv."""
    from position_figure import draw

    options = _parser().parse_args()
    windows, model = _windows_and_model(options)
    label = Path(options.adapter or options.model).name
    curves = [measure(model, windows, label)]
    reach = int(
        model.config.rope_parameters.get("original_max_position_embeddings", model.config.max_position_embeddings)
    )
    write_csv(options.output / "loss_by_position.csv", curves)
    draw(options.output / "loss_by_position.png", curves, reach, f"Loss by position, {label}")
    print(*table_lines(curves, reach), sep="\n")


if __name__ == "__main__":
    run_main(main)
