"""Chosen experts: are they right on this GPU, what does each pass move a second, and where does a step's time go?

    python scripts/bench/experts.py                         # gpt-oss-20b, 2 layers, 64K tokens
    python scripts/bench/experts.py --shape deepseek-v2-lite --layers 4 --out out/

For a module of the shape's experts: errors of ours and of the model's own way against float64, then seconds of one
chunk forward, and forward and backward. Then a step of a few layers with each way: its seconds, its peak of memory,
and its kernels by kind, under a profiler. Without a GPU everything runs on tiny sizes, for a look at the script.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from where_time_goes import DEVICE, ON_GPU, by_kind, config_of, profiled
from where_time_goes import seconds_of as median_seconds

import hf_fpdt.model.fused
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.options import count, tokens
from hf_fpdt.model.experts.gates import gate_of as ask_gate
from hf_fpdt.model.experts.operation import Weights, run_experts
from hf_fpdt.model.experts.passes import gather_rows, sum_rows
from hf_fpdt.model.experts.replace import are_experts, replace_experts
from hf_fpdt.model.experts.routes import Routes
from hf_fpdt.model.shapes import SHAPES, build_random
from hf_fpdt.units import GIB


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt-oss-20b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=count, default=2, help="of the step (default: %(default)s)")
    parser.add_argument("--tokens", type=tokens, default=tokens("64K"), help="of the step (default: 64K)")
    parser.add_argument("--chunk", type=tokens, default=tokens("32K"), help="of the module alone (default: 32K)")
    parser.add_argument("--skip-module", action="store_true", help="steps alone")
    parser.add_argument("--kernel", default="auto", help="of attention (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for kernels of each step")
    options = parser.parse_args()
    if not ON_GPU:
        options.tokens, options.chunk = 96, 64
    return options


def experts_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if are_experts(module))


# Asking takes time, and a step asks once.
gate_of = functools.cache(ask_gate)


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Of the median call; one before does not count."""
    run()
    return median_seconds(run, repeats)


# -- a module of experts ----------------------------------------------------------------------------------------------


def inputs_of(experts: Any, count: int, visited: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts, their weights, and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x, dy = (torch.randn(count, width, device=DEVICE, generator=generator).to(dtype) for _ in range(2))
    logits = torch.randn(count, experts.num_experts, device=DEVICE, generator=generator)
    top, chosen = logits.topk(visited, dim=-1)
    return x, chosen, top.softmax(-1).to(dtype), dy


def ours(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor, unread: bool = False) -> Tensor:
    first, second = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        first, second = first.transpose(-2, -1), second.transpose(-2, -1)
    biases = (experts.gate_up_proj_bias, experts.down_proj_bias) if experts.has_bias else (None, None)
    routes = Routes.of(chosen, experts.num_experts)
    return run_experts(x, weights, routes, Weights(first, second, *biases), gate_of(experts), unread)


def results(run: Callable[..., Tensor], experts: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    x, chosen, weights, dy = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(experts, x, chosen, weights)
    named = {"dx": x, "d_weights": weights} | {n: p for n, p in experts.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad([y], list(named.values()), [dy])
    return {"y": y.detach()} | dict(zip(named, grads, strict=True))


def own(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    result: Tensor = type(experts).forward(experts, x, chosen, weights)
    return result


def print_errors(experts: Any, visited: int) -> None:
    """Of ours and of the model's own way against float64; every weight trains."""
    small = copy.deepcopy(experts).requires_grad_()
    inputs = inputs_of(small, 2048 if ON_GPU else 64, visited, small.down_proj.dtype)
    found = results(ours, small, inputs), results(own, small, inputs)
    wide = small.double()
    x, chosen, weights, dy = inputs
    truth = results(ours, wide, (x.double(), chosen, weights.double(), dy.double()))
    eager = copy.copy(wide)
    eager.config = copy.copy(wide.config)
    eager.config._experts_implementation = "eager"
    plain = results(own, eager, (x.double(), chosen, weights.double(), dy.double()))
    for name, exact in truth.items():
        sizes = [float((each[name].double() - exact).norm() / exact.norm()) for each in (*found, plain)]
        print(f"  {name:20s} ours {sizes[0]:.2e}   the model's {sizes[1]:.2e}   float64 of both {sizes[2]:.1e}")


def print_seconds(experts: Any, options: argparse.Namespace, visited: int) -> None:
    inputs = inputs_of(experts, options.chunk, visited, experts.down_proj.dtype)
    x, chosen, weights, dy = inputs

    def backward(run: Callable[..., Tensor], **how: Any) -> None:
        leaf, shares = x.detach().requires_grad_(), weights.detach().requires_grad_()
        torch.autograd.grad([run(experts, leaf, chosen, shares, **how)], [leaf, shares], [dy])

    for name, run in (("the model's", own), ("ours", ours)):
        with torch.no_grad():
            forward = seconds_of(functools.partial(run, experts, x, chosen, weights))
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        both = seconds_of(functools.partial(backward, run))
        peak = (torch.cuda.max_memory_allocated() - before) / GIB if ON_GPU else 0.0
        print(f"  {name:12s} forward {forward * 1e3:8.2f} ms   with backward {both * 1e3:8.2f} ms   {peak:.2f} GiB")
    print(f"  ours, value unread: with backward {seconds_of(lambda: backward(ours, unread=True)) * 1e3:8.2f} ms")
    print_passes(experts, x, chosen, weights)


def print_passes(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Each pass alone: milliseconds, and bytes read and written a second."""
    routes, gate = Routes.of(chosen, experts.num_experts), gate_of(experts)
    bias, out_bias = (experts.gate_up_proj_bias, experts.down_proj_bias) if experts.has_bias else (None, None)
    rows, _ = gather_rows(x, routes, x.dtype, None)
    width = experts.gate_up_proj.shape[2 if experts.is_transposed else 1]
    gate_up = torch.randn(len(rows), width, device=DEVICE, dtype=x.dtype)
    hidden = gate.forward(gate_up, bias, routes)
    shares, tokens_S = weights.flatten()[routes.order_S], routes.tokens_S
    passes: dict[str, tuple[Callable[[], object], int]] = {
        "routes": (lambda: Routes.of(chosen, experts.num_experts), 0),
        "gather": (lambda: gather_rows(x, routes, x.dtype, None), 2 * rows.nbytes),
        "gather by PyTorch": (lambda: x[tokens_S], 2 * rows.nbytes),
        "gather, bias": (lambda: gather_rows(x, routes, x.dtype, out_bias), 2 * rows.nbytes),
        "gate forward": (lambda: gate.forward(gate_up, bias, routes), gate_up.nbytes + hidden.nbytes),
        "gate backward": (
            lambda: gate.backward(gate_up, bias, routes, hidden, shares),
            2 * gate_up.nbytes + hidden.nbytes,
        ),
        "sum": (lambda: sum_rows(rows, routes, x.dtype, weights, out_bias), rows.nbytes + x.nbytes),
        "sum of gradients": (lambda: sum_rows(rows, routes, x.dtype), rows.nbytes + x.nbytes),
    }
    for name, (run, moved) in passes.items():
        seconds = seconds_of(run)
        print(f"  {name:20s} {seconds * 1e3:8.3f} ms {moved / seconds / 1e12:6.2f} TB/s")


# -- steps ------------------------------------------------------------------------------------------------------------


@contextmanager
def own_experts() -> Iterator[None]:
    """Inside, experts run as the model has them."""
    hf_fpdt.model.fused.replace_experts = lambda module, settings: None
    try:
        yield
    finally:
        hf_fpdt.model.fused.replace_experts = replace_experts


def print_step(name: str, model: Any, options: argparse.Namespace) -> None:
    handle = apply_fpdt(model, FPDTPlugin(kernel=options.kernel))
    generator = torch.Generator(DEVICE).manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, options.tokens), device=DEVICE, generator=generator)
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        model.zero_grad()

    step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    took = seconds_of(step, 3)
    peak = torch.cuda.max_memory_allocated() / GIB if ON_GPU else 0.0
    print(f"{name}: step {took:.3f} s, peak {peak:.2f} GiB, loss {losses[0].item():.5f}")
    profile(name, step, options)
    handle.remove()


def profile(name: str, step: Callable[[], None], options: argparse.Namespace) -> None:
    kernels, calls, _ = profiled(step)
    lines = [f"{sum(kernels.values()):10.1f} ms"]
    lines += [f"{ms:10.1f} {calls[kernel]:6d} {kernel[:160]}" for kernel, ms in list(kernels.items())[:60]]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"kernels-{name.replace(' ', '-')}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in by_kind(kernels).items())
    print(f"  {kinds}; all {sum(kernels.values()):.0f} ms")


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    config = config_of(options)
    visited = config.num_experts_per_tok
    model = build_random(config, DEVICE, torch.bfloat16 if ON_GPU else torch.float32, lora=True)
    print(f"{options.shape}, {options.layers} layers; {torch.cuda.get_device_name() if ON_GPU else 'CPU'}")
    if not options.skip_module:
        experts: Any = experts_of(model)
        with torch.no_grad():
            for parameter in experts.parameters():  # the model's are small numbers, and its biases are nothing
                parameter.normal_(std=0.02 if parameter.dim() == 3 else 1.0)
        print_errors(experts, visited)
        print_seconds(experts, options, visited)
    print_step("ours", model, options)
    with own_experts():
        print_step("the model's", model, options)


if __name__ == "__main__":
    main()
