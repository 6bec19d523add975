"""A plan as people and programs read it, and a model's sizes from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from .fit import Fit, Machines, Training, Weights, machine_bytes
from .memory import ModelSizes
from .model import decoder_layers
from .offload import GIB
from .patch import AUTO_CHUNK_TOKENS_GPU, auto_loss_tokens
from .shapes import build_random


def training_of(config: PreTrainedConfig, *, lora: bool) -> Training:
    """Sizes of a model with this configuration; it is built without memory for its weights, to count them."""
    built: Any = build_random(config, "meta", torch.bfloat16, lora)
    model = built.get_base_model() if lora else built
    layers = decoder_layers(model)
    inside = [list(layer.parameters()) for layer in layers]
    total, trained = _count(model.parameters()), _count(model.parameters(), trained=True)
    in_layers = [_count(parameters, trained=True) for parameters in inside]
    text = config.get_text_config()
    largest = max(map(_count, inside))
    return Training(
        model=ModelSizes.of(text, layers=len(layers), layer_parameters=largest),
        weights=Weights(
            total=total,
            trained=trained,
            largest_trained=max(trained - sum(in_layers), *in_layers),
            outside=total - sum(map(_count, inside)),
        ),
        vocabulary=text.vocab_size,
        chunk_tokens=AUTO_CHUNK_TOKENS_GPU,
        loss_tokens=auto_loss_tokens(text.vocab_size),
    )


def _count(parameters: Any, *, trained: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def as_json(found: Fit, helps: Mapping[str, int], least: Fit | None = None) -> dict[str, Any]:
    """Numbers, in bytes and seconds; `least` is the step with the least host memory."""
    kept, kv, told = found.plan.kept, found.plan.kv, found.plan.foretold
    assert told is not None
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
        "device_bytes": dict(found.device),
        "host_bytes": found.host,
        "disk_bytes": told.disk_bytes * found.step.plan.sp_size,
        "inputs_kept": kept.inputs.count(True),
        "attention_outputs_kept": kept.attentions.count(True),
        "layers": kept.layers,
        "resident_chunks": kv.backward_resident,
        "longest_with": dict(helps),
        **({} if least is None else {"least_host_bytes": least.host, "seconds_with_least": least.seconds}),
    }


def as_text(found: Fit, machines: Machines, helps: Mapping[str, int], least: Fit | None = None) -> str:
    """A few lines; `least` is the step with the least host memory."""
    plan, kept, told = found.step.plan, found.plan.kept, found.plan.foretold
    assert told is not None
    hours = f"{found.seconds:,.1f} s" if found.seconds < 7200 else f"{found.seconds / 3600:.1f} h"
    speed, computing = plan.n_tokens / found.seconds, found.seconds - found.exchange_seconds
    lines = [
        f"{plan.n_tokens:,} tokens on {machines.gpus} x {machines.gpu.name}, {machines.host_bytes / GIB:,.0f} GiB of "
        f"host memory, in {len(plan.chunks)} chunks of {plan.chunk_tokens:,}",
        f"  a step                {hours}, {speed:,.0f} tokens/s, strict MFU {found.strict_mfu:.3f}",
        f"  by                    {machines.gpu.source}",
        f"  inputs kept           {_layers(kept.inputs)}",
        f"  attention outputs     {_layers(kept.attentions)}",
        f"  done again            attention of {kept.attention_reruns} layers, {kept.rebuilt} inputs rebuilt",
        f"  K, V                  {found.plan.kv.backward_resident} of {len(plan.chunks)} chunks on the GPU",
        f"  copies                {found.copy_seconds:,.1f} s a step, under {computing:,.1f} s of computation",
        *_between_gpus(found),
        "",
        f"  each GPU              {_total(found.device):8.1f} of {machines.gpu.memory_gib:.1f} GiB",
        *(f"    {name:40} {size / GIB:8.1f}" for name, size in found.device if size >= 0.05 * GIB),
        f"  hosts, pinned         {found.host / GIB:8.1f} of {machines.host_bytes / GIB:,.0f} GiB",
    ]
    if least is not None:
        host = f"{machine_bytes(least.host) / GIB:8.1f} GiB, then a step takes {least.seconds:,.1f} s and keeps"
        lines.append(f"  least host memory     {host} {least.plan.kept}")
    if told.disk_bytes:
        lines.append(f"  files                 {told.disk_bytes * plan.sp_size / GIB:8.1f} GiB")
    if helps:
        lines += ["", f"  ends by               {_limit(helps)}", "  longer with"]
        lines += [f"    {name:40} {tokens:>12,} tokens" for name, tokens in helps.items()]
        if not any("GPUs" in name for name in helps):
            lines.append(
                f"    twice the GPUs: not by sp_size, {found.step.model.q_heads} query heads do not divide by more"
            )
    return "\n".join(lines)


def _between_gpus(found: Fit) -> list[str]:
    """What several GPUs send each other: what computation waits for, and what FSDP2 does meanwhile."""
    if found.step.plan.sp_size == 1:
        return []
    beside = f"; weights and gradients {found.gather_seconds:,.1f} s beside it" if found.gather_seconds else ""
    return [f"  exchanges             {found.exchange_seconds:,.1f} s of the step, computation waits{beside}"]


def _layers(flags: tuple[bool, ...]) -> str:
    """How many of how many, and which: "9 of 32: 0, 2, 26-31"."""
    runs: list[list[int]] = []
    for layer in (i for i, flag in enumerate(flags) if flag):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    which = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{sum(flags)} of {len(flags)}" + (f": layers {which}" if 0 < sum(flags) < len(flags) else "")


def _limit(helps: Mapping[str, int]) -> str:
    """What a quarter more of helps most."""
    quarters = {name: tokens for name, tokens in helps.items() if name.startswith("a quarter")}
    return max(quarters, key=lambda name: quarters[name]).removeprefix("a quarter more ")


def _total(items: tuple[tuple[str, int], ...]) -> float:
    return sum(size for _, size in items) / GIB
