"""Packed rows on a GPU: each kernel's packed calls are right within twice plain bfloat16's error, in a model too."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.attention import AttentionSpec, Kernel, attention, backward_row, forward_row, row_calls, sinks_gradient
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.commands.accuracy import LOSS, Tensors, worst_of_run
from hf_fpdt.layout.documents import Documents
from hf_fpdt.memory.kv import KVStore
from tests.attention.test_kinds_gpu import SIZES
from tests.helpers.packed import PACKED, moved, positions
from tests.helpers.support import assert_rejects

DTYPE = torch.bfloat16
DEVICE = "cuda"
# Query heads, key heads, width of keys, width of values.
HEADS = ((8, 8, 64, 64), (8, 2, 128, 128), (4, 4, 192, 128), (4, 2, 256, 256))
ROW = 512
# The first goes on over three rows; of one token; one that ends with a row, and one that is a row.
DOCUMENTS = Documents.of_lengths([1100, 1, 30, 405, 1, 511, 120, 300])


def spec_of(heads: tuple[int, ...], window: int | None, softcap: float | None) -> AttentionSpec:
    q_heads, kv_heads, width, value_width = heads
    return AttentionSpec(
        scale=width**-0.5,
        head_dim=width,
        value_dim=value_width,
        grouped=q_heads != kv_heads,
        window=window,
        softcap=softcap,
        packed=True,
    )


def inputs(heads: tuple[int, ...], device: str) -> tuple[list[Tensor], Tensor]:
    """(q, k, v and sinks; the output's gradient)."""
    q_heads, kv_heads, width, value_width = heads
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, DTYPE)

    tokens = DOCUMENTS.n_tokens
    q, k = normal(1, tokens, q_heads, width, size=3.0), normal(1, tokens, kv_heads, width)
    v, dout = normal(1, tokens, kv_heads, value_width), normal(1, tokens, q_heads, value_width)
    return [q, k, v, normal(q_heads, size=3.0)], dout


def by_hand(given: list[Tensor], dout: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> list[Tensor]:
    """Out and gradients, one document at a time."""
    *qkv, sinks = wide = [x.to(dtype).requires_grad_() for x in given]
    kind: dict[str, Any] = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
    parts = zip(*(x.split(DOCUMENTS.lengths, dim=1) for x in qkv), strict=True)
    out = torch.cat([attention(q, k, v, sinks, **kind)[0] for q, k, v in parts], dim=1)
    return [out.detach(), *torch.autograd.grad(out, wide, dout.to(dtype))]


def by_rows(
    kernel: Kernel, given: list[Tensor], dout: Tensor, spec: AttentionSpec, documents: Documents
) -> list[Tensor]:
    """As the executor runs them: rows of queries, each in the calls that the kernel wants, keys all resident."""
    q, k, v, sinks = given
    stores = KVStore.holding(k, v), KVStore.holding(k, v)
    out, dq, d_sinks = torch.empty_like(dout), torch.empty_like(q), torch.zeros_like(sinks, dtype=torch.float32)
    for start in range(0, q.shape[1], ROW):
        row = start, min(start + ROW, q.shape[1])
        for part, spans in row_calls(kernel, row, ROW, stores[0], window=spec.window, documents=documents):
            at = slice(start + part.start, start + part.stop)
            made = forward_row(kernel, q[:, at], stores[0].stream(spans), spec=spec, sinks_N=sinks)
            out[:, at] = made[0]
            dq[:, at] = backward_row(kernel, dout[:, at], q[:, at], made, stores[1], spans, spec=spec)
            d_sinks += sinks_gradient(dout[:, at], made, sinks)
    return [out, dq, *stores[1].take_grad(stores[1].plan.chunks[0]), d_sinks]


def check(results: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
    for name, mine, true, naive in zip(("out", "dq", "dk", "dv", "dsinks"), results, exact, plain, strict=True):
        error, allowed = (float((x.double() - true).norm()) for x in (mine, naive))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, of plain bfloat16 {allowed:.2e}"


def check_kernel(
    kernel: Kernel, heads: tuple[int, ...], window: int | None, softcap: float | None, device: str
) -> None:
    spec, (given, dout) = spec_of(heads, window, softcap), inputs(heads, device)
    exact, plain = (by_hand(given, dout, spec, dtype) for dtype in (torch.float64, DTYPE))
    check(by_rows(kernel, given, dout, spec, DOCUMENTS), exact, plain)
    wrong = {"off by one": moved(DOCUMENTS), "one document": Documents((0,), DOCUMENTS.n_tokens)}
    broken = {name: by_rows(kernel, given, dout, spec, documents) for name, documents in wrong.items()}
    assert_rejects(partial(check, exact=exact, plain=plain), broken)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 128, 700])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("cpu", "math")])
def test_packed_rows_are_right(name: str, heads: tuple[int, ...], window: int | None, softcap: float | None) -> None:
    reason = KERNELS[name].why_not(torch.device("cuda"), DTYPE, spec_of(heads, window, softcap))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    check_kernel(KERNELS[name], heads, window, softcap, "cuda")


@pytest.mark.parametrize("kernel", [KERNELS["cpu"], PACKED], ids=["cpu", "packed"])
def test_the_check_itself_holds_on_a_cpu(kernel: Kernel) -> None:
    """What a GPU is asked is asked here of a kernel that is known to be right."""
    check_kernel(kernel, (2, 1, 16, 16), 700, None, "cpu")


def a_step(model: Any, dtype: torch.dtype, documents: Documents, plugin: FPDTPlugin | None = None) -> Tensors:
    model = copy.deepcopy(model).to(DEVICE, dtype)
    if plugin is not None:
        apply_fpdt(model, plugin)
    ids = torch.randint(0, 512, (1, DOCUMENTS.n_tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if plugin is None:
        # What plain transformers sees in a packed row depends on the family; a document by itself it cannot mistake.
        labelled = DOCUMENTS.n_tokens - len(DOCUMENTS.lengths)
        parts = [part for part in ids.split(DOCUMENTS.lengths, dim=1) if part.shape[1] > 1]
        loss = sum(model(input_ids=part, labels=part, num_items_in_batch=labelled).loss for part in parts)
    else:
        labels = ids.masked_fill(positions(DOCUMENTS).to(DEVICE) == 0, -100)
        loss = model(input_ids=ids, labels=labels, position_ids=positions(documents).to(DEVICE)).loss
    loss.backward()
    return {LOSS: loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "flash", "cudnn"])
@pytest.mark.parametrize("kind", ["plain", "sinks"])
@pytest.mark.parametrize("place", [{}, {"device_budget_gib": 0, "checkpoints": "segment"}], ids=["device", "host"])
def test_a_model_trains_as_the_plain_one(kind: str, kernel: str, place: dict[str, Any]) -> None:
    """Windows, sinks and full attention beside each other in one of the two."""
    if kind == "sinks" and kernel == "cudnn":
        pytest.skip("cudnn does no windows")
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "sinks" else {}
    sizes = {name: size for name, size in SIZES.items() if kind == "sinks" or name != "sliding_window"}
    config: Any = (GptOssConfig if kind == "sinks" else LlamaConfig)(**sizes, **more)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "sinks" in name else 0.05)
    truth, plain = a_step(model, torch.float64, DOCUMENTS), a_step(model, DTYPE, DOCUMENTS)
    plugin = FPDTPlugin(chunk_tokens=512, loss_chunk_tokens=512, kernel=kernel, **place)

    def verdict(step: Tensors) -> None:
        found = worst_of_run(step, plain, truth)
        assert found.passed, found

    verdict(a_step(model, DTYPE, DOCUMENTS, plugin))
    leaky = a_step(model, DTYPE, Documents((0,), DOCUMENTS.n_tokens), plugin)
    assert_rejects(verdict, {"one document": leaky})
