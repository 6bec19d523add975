"""A plan as tables for a terminal, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...forecast import Machines, More, PlannedStep, Use, machine_bytes
from ...layout import seen_pairs
from ...plan import KeptLayers, StepSizes, described_windows, linear_bytes, linear_share
from ...units import GIB


def as_json(found: PlannedStep, helps: Mapping[More, int], least: PlannedStep | None = None) -> dict[str, Any]:
    """Numbers, in bytes and seconds; `least` is the step with the least host memory."""
    kept, kv, forecast = found.plan.kept, found.plan.kv, found.plan.forecast
    return {
        "tokens": found.step.plan.n_tokens,
        "sp_size": found.step.plan.sp_size,
        "chunk_tokens": found.step.plan.chunk_tokens,
        "seconds": found.seconds,
        "tokens_per_s": found.step.plan.n_tokens / found.seconds,
        "strict_mfu": found.strict_mfu,
        "copy_seconds": found.copy_seconds,
        "exchange_seconds": found.exchange_seconds,
        "gather_seconds": found.gather_seconds,
        "device_bytes": {use.value: size for use, size in found.device},
        "peak_device_bytes": found.peak,
        "host_bytes": found.host,
        "host_weight_bytes": found.host_weights,
        "disk_bytes": forecast.disk_bytes * found.step.plan.sp_size,
        "inputs_kept": kept.inputs.count(True),
        "attention_outputs_kept": kept.attentions.count(True),
        "linear_outputs_kept": linear_share(kept, found.step, range(kept.layers)),
        "linear_output_bytes": linear_bytes(kept, found.step.layer_bytes(kept.layers)).total,
        "layers": kept.layers,
        "resident_chunks": kv.backward_resident,
        "windows": list(found.step.windows) if any(found.step.windows) else [],
        "ring_bytes": max(kv.forward_ring, kv.backward_ring),
        **documents_as_json(found),
        "key_dim": found.step.model.head_dim,
        "value_dim": found.step.model.value_dim,
        **quantised_as_json(found),
        "longest_with": {more.value: tokens for more, tokens in helps.items()},
        **({} if least is None else {"least_host_bytes": least.host, "seconds_with_least": least.seconds}),
    }


# Columns that the tables need: with fewer, rich would break numbers in two.
WIDTH = 80
# Less is not worth a line.
SHOWN = 0.05 * GIB
ALL = 0.9999
# What people read of each.
USE_NAMES = MappingProxyType(
    {
        Use.WEIGHTS: "weights",
        Use.GRADIENTS: "gradients",
        Use.OPTIMIZER: "optimizer",
        Use.SUMS: "sums of gradients over chunks",
        Use.NCCL: "NCCL",
        Use.WORKING: "activations and gradients of a step",
        Use.KV: "K, V, dK, dV",
        Use.CHECKPOINTS: "checkpoints",
    }
)
MORE_NAMES = MappingProxyType(
    {
        More.HOST_MEMORY: "a quarter more host memory",
        More.GPU_MEMORY: "a quarter more GPU memory",
        More.GPUS: "twice the GPUs and hosts",
    }
)
# Which quarter more helps most says what ends the growth.
LIMITS = MappingProxyType({More.HOST_MEMORY: "host memory", More.GPU_MEMORY: "GPU memory"})
HOUR_S, HOURS_FROM_S = 3600, 7200
STEP = ("a step", "tokens/s", "strict\nMFU", "copies\nunder it", "chunks x\ntokens", "K, V on\nthe GPU")


def plan_tables(
    found: PlannedStep, machines: Machines, helps: Mapping[More, int], least: PlannedStep | None = None
) -> Iterator[RenderableType]:
    """What `rich` prints of a plan.

    Args:
        found: the step.
        machines: those that it is planned for.
        helps: longest sequences in tokens, by what there would be more of; empty: not asked for.
        least: the step with the least host memory, where that was asked for.
    """
    gib = f"{machines.host_bytes / GIB:,.0f} GiB of host memory"
    yield Text(f"{found.step.plan.n_tokens:,} tokens on {machines.gpus} x {machines.gpu.name}, {gib}", style="bold")
    yield from ("", _step(found))
    if found.step.plan.sp_size > 1:
        yield from _between_gpus(found)
    yield from map(Text, heads_lines(found))
    yield Text(machines.gpu.source, style="italic")
    yield from ("", _memory(found, machines), "", _layers(found.plan.kept, found.step))
    if least is not None:
        yield from ("", _least(least, found, machines))
    if helps:
        yield from ("", _longer(helps, found.step.plan.n_tokens))
        if More.GPUS not in helps:
            yield Text(f"twice the GPUs: not by sp_size, {found.step.model.q_heads} query heads do not divide by more")


def _table(*titles: str, words: int = 1) -> Table:
    """A table whose first columns, so many, are words, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < words else "right", overflow="fold")
    return table


def _step(found: PlannedStep) -> Table:
    plan, table = found.step.plan, _table(*STEP, words=0)
    computing = found.seconds - found.exchange_seconds
    table.add_row(
        _time(found.seconds),
        f"{plan.n_tokens / found.seconds:,.0f}",
        f"{found.strict_mfu:.3f}",
        f"{found.copy_seconds:,.1f} s, {100 * found.copy_seconds / computing:.1f} %",
        f"{len(plan.chunks)} x {plan.chunk_tokens:,}",
        "in windows" if found.plan.kv.all_windowed else f"{found.plan.kv.backward_resident} of {len(plan.chunks)}",
    )
    return table


def _between_gpus(found: PlannedStep) -> Iterator[Text]:
    """What GPUs send each other: what computation waits for, and what FSDP2 does meanwhile."""
    yield Text(f"exchanges between GPUs: {found.exchange_seconds:,.1f} s of the step, in which nothing is computed")
    if found.gather_seconds:
        yield Text(f"weights and gradients between GPUs: {found.gather_seconds:,.1f} s under the computation")


def documents_as_json(found: PlannedStep) -> dict[str, Any]:
    """Of a packed row, how many documents it holds, and what share of the pairs of one document is computed."""
    documents, n_tokens = found.step.documents, found.step.plan.n_tokens
    if documents is None:
        return {}
    pairs = seen_pairs(0, n_tokens, None, documents) / seen_pairs(0, n_tokens, None)
    return {"documents": len(documents.starts), "share_of_pairs": pairs}


def quantised_as_json(found: PlannedStep) -> dict[str, Any]:
    """Of weights in 4 or 8 bits: how many, their bytes, and those of one layer's dequantised."""
    weights = found.weights
    if not weights.packed:
        return {}
    sizes = {"quantised_weights": weights.packed, "quantised_bytes": weights.packed_bytes}
    return {**sizes, "dequantised_bytes": found.step.whole_bytes}


def heads_lines(found: PlannedStep) -> Iterator[str]:
    """What is not plain: documents, windows, what one has on a GPU, quantised weights, values of another width."""
    kv, model = found.plan.kv, found.step.model
    if packed := documents_as_json(found):
        count, share = packed["documents"], 100 * packed["share_of_pairs"]
        yield (
            f"a row of {count:,} documents, {found.step.plan.n_tokens / count:,.0f} tokens each on average: attention "
            f"computes {share:.1f} % of the pairs of one"
        )
    if windows := described_windows(found.step):
        yield ", ".join(windows)
    if any(found.step.windows):
        ring = max(kv.forward_ring, kv.backward_ring)
        yield f"of their K and V a GPU holds what one row reads: {ring / GIB:,.2f} GiB; hosts hold none"
    if packed := quantised_as_json(found):
        yield (
            f"{packed['quantised_weights'] / 1e9:,.2f} G weights are quantised: "
            f"{8 * packed['quantised_bytes'] / packed['quantised_weights']:.3f} bits each, "
            f"{packed['quantised_bytes'] / GIB:,.2f} GiB; a layer's are dequantised while it runs: "
            f"{packed['dequantised_bytes'] / GIB:,.2f} GiB, among activations below"
        )
    if model.value_dim != model.head_dim:
        yield f"heads of {model.head_dim} for queries and keys, of {model.value_dim} for values"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < HOURS_FROM_S else f"{seconds / HOUR_S:.1f} h"


def _memory(found: PlannedStep, machines: Machines) -> Table:
    gpus, forecast = found.step.plan.sp_size, found.plan.forecast
    kv = gpus * found.plan.kv.host_buffer_bytes
    host = {Use.WEIGHTS: found.host_weights, Use.KV: kv, Use.CHECKPOINTS: found.host - kv - found.host_weights}
    disk = {Use.CHECKPOINTS: gpus * forecast.disk_bytes}
    device = dict(found.device)
    places = [(device, int(machines.gpu.memory_gib * GIB)), (host, machines.host_bytes), (disk, machines.disk_bytes)]
    places = places[: 3 if machines.disk_bytes else 2]
    table = _table(*("GiB", "each GPU", "hosts, pinned", "files")[: 1 + len(places)])
    for use in device:
        sizes = [items.get(use, 0) for items, _ in places]
        if max(sizes) >= SHOWN:
            table.add_row(USE_NAMES[use], *map(_gib, sizes))
    table.add_row("together", *(_gib(sum(items.values())) for items, _ in places), style="bold")
    table.add_row("available", *(_gib(size) for _, size in places))
    table.add_row("expected peak", _gib(found.peak))
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f}" if size >= SHOWN else "-"


def _layers(kept: KeptLayers, step: StepSizes) -> Table:
    """Layers of one policy are one row, whatever lies between them; linears where some of their outputs are kept."""
    alike: dict[tuple[bool, bool, str], list[int]] = {}
    for layer, (has_input, has_attention) in enumerate(zip(kept.inputs, kept.attentions, strict=True)):
        policy = has_input, has_attention, _share(linear_share(kept, step, [layer]))
        alike.setdefault(policy, []).append(layer)
    column = ("linears",) if kept.linears else ()
    table = _table("layers", "how many", "input", "attention output", *column)
    for (has_input, has_attention, share), layers in alike.items():
        words = "kept" if has_input else "rebuilt", "kept" if has_attention else "run again"
        table.add_row(_runs(layers), str(len(layers)), *words, *(share for _ in column))
    if len(alike) > 1:
        inputs = f"{kept.inputs.count(True)} kept, {kept.rebuilt} rebuilt"
        attentions = f"{kept.attentions.count(True)} kept, {kept.attention_reruns} run again"
        shares = (_share(linear_share(kept, step, range(kept.layers))) for _ in column)
        table.add_row("together", str(kept.layers), inputs, attentions, *shares, style="bold")
    return table


def _share(part: float) -> str:
    """Of what the linears of some layers compute again where nothing is kept of them, by operations."""
    return "run again" if not part else "kept" if part > ALL else f"{100 * part:.0f} % kept"


def _runs(layers: Sequence[int]) -> str:
    """Layers in ascending order by runs: "0, 2, 26-31"."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _least(least: PlannedStep, found: PlannedStep, machines: Machines) -> Table:
    table = _table("host memory", "GiB", "a step", "inputs kept", "attention outputs")
    for name, step, size in (
        ("the least", least, machine_bytes(least.host)),
        ("this plan", found, machines.host_bytes),
    ):
        kept = step.plan.kept
        counts = (f"{flags.count(True)} of {kept.layers}" for flags in (kept.inputs, kept.attentions))
        table.add_row(name, f"{size / GIB:,.1f}", _time(step.seconds), *counts)
    return table


def _longer(helps: Mapping[More, int], n_tokens: int) -> Table:
    table = _table(f"ends by {_limit(helps)}; longer with", "tokens", "more")
    for more, tokens in helps.items():
        table.add_row(MORE_NAMES[more], f"{tokens:,}", f"{100 * (tokens / n_tokens - 1):+.0f} %")
    return table


def _limit(helps: Mapping[More, int]) -> str:
    """What a quarter more of helps most."""
    return LIMITS[max((more for more in helps if more in LIMITS), key=lambda more: helps[more])]
