"""Seconds of what GPUs send each other: by hand, and the copies around an exchange as they are made.

That the bytes are those of real steps is for the tests of the planner, of FSDP2 under accelerate and of offload on
several ranks: they count them in processes that train anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fpdt.forecast.collectives import ShardedWeights
from hf_fpdt.forecast.seconds import COPY_PASSES, GPUS_A_HOST, ORDER_PASSES, sharded_seconds, ulysses, ulysses_seconds
from hf_fpdt.layout.chunks import ChunkPlan
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.plan.sizes import StepSizes
from tests.forecast.test_rates import H100, LLAMA_8B, kept
from tests.helpers.support import assert_rejects

ALL = kept(32, 32, 32)


def step(n_tokens: int, ranks: int) -> StepSizes:
    return StepSizes(LLAMA_8B, ChunkPlan(n_tokens, 8192 * ranks, ranks), loss_tokens=1024, vocabulary=128_256)


def token_heads(n_tokens: int, ranks: int) -> int:
    """Bytes of one head of a rank's tokens in all layers, as far as they go to other ranks."""
    return 32 * n_tokens // ranks * 128 * 2 * (ranks - 1) // ranks


def test_a_known_step() -> None:
    """Llama-3.1-8B, 131,072 tokens on two H100s: 64.4 GB, 0.2 s on the way and half as long again in copies."""
    sent = token_heads(2**17, 2) * (2 * 32 + 2 * 8 + 4 * 32 + 4 * 8)
    assert ulysses(step(2**17, 2), ALL).sent_bytes == sent == 64_424_509_440
    seconds = sent / (0.6 * 450e9) + 2 * 2.4 * sent / 3.0e12
    assert ulysses_seconds(step(2**17, 2), ALL, H100) == pytest.approx(seconds) == pytest.approx(0.342, abs=1e-3)


def assert_widths(sent_bytes: Callable[[StepSizes], int]) -> None:
    """Keys of 192 elements and values of 128: q, k, dq, dk, and v, out, dv, dout."""
    model = replace(LLAMA_8B, kv_heads=32, head_dim=192, value_dim=128, windows=(4096,) * 16 + (None,) * 16)
    own = 32 * 2**17 // 2 * 2 // 2  # bytes of an element of a rank's tokens in all layers, to the other rank
    forward, backward = 32 * (2 * 192 + 2 * 128), 32 * (2 * 192 + 2 * 128) * 2
    assert sent_bytes(replace(step(2**17, 2), model=model)) == own * (forward + backward)


def test_what_is_as_wide_as_values_is_exchanged_so() -> None:
    def sent(sizes: StepSizes) -> int:
        return ulysses(sizes, ALL).sent_bytes

    assert_widths(sent)
    assert_rejects(
        assert_widths,
        {
            "all as wide as keys": lambda sizes: sent(replace(sizes, model=replace(sizes.model, value_dim=192))),
            "all as wide as values": lambda sizes: sent(replace(sizes, model=replace(sizes.model, head_dim=128))),
        },
    )


def test_layers_that_run_again_exchange_again() -> None:
    heads = token_heads(2**18, 4)
    base, rebuilt, attention_too = (
        ulysses(step(2**18, 4), keeps).sent_bytes for keeps in (ALL, kept(32, 27, 32), kept(32, 27, 0))
    )
    assert rebuilt - base == heads * 32 * 5 // 32, "attention's output was kept and is exchanged"
    assert attention_too - base == heads * (2 * 32 + 2 * 8) * 5 // 32
    assert ulysses(step(2**18, 4), kept(32, 32, 0)).sent_bytes == base, "attention run again reads what is exchanged"


def test_key_value_heads_are_repeated_until_ranks_divide_them() -> None:
    few, enough = (replace(LLAMA_8B, kv_heads=heads) for heads in (8, 16))
    sent = [ulysses(replace(step(2**18, 16), model=model), ALL).sent_bytes for model in (few, enough)]
    assert sent[0] == sent[1]


@pytest.mark.parametrize("ranks", [16, 32])
def test_beyond_a_host_the_network_sets_the_pace(ranks: int) -> None:
    sizes = step(2**20, ranks)
    sent = ulysses(sizes, ALL).sent_bytes
    order = ORDER_PASSES * sent * ranks / (ranks - 1) / H100.memory
    outside = sent * (ranks - GPUS_A_HOST) / (ranks - 1)
    assert ulysses_seconds(sizes, ALL, H100) == pytest.approx(outside / 50e9 + order)
    fast = replace(H100, network=1e15)
    assert ulysses_seconds(sizes, ALL, fast) == pytest.approx(sent * 7 / (ranks - 1) / H100.peers + order)


def test_one_gpu_sends_nothing() -> None:
    assert ulysses(step(2**17, 1), ALL).sent_bytes == ulysses_seconds(step(2**17, 1), ALL, H100) == 0


@pytest.mark.parametrize(("ranks", "rate"), [(8, 0.6 * 450e9), (16, 8 * 30e9)])
def test_weights_are_gathered_twice_and_once_more_for_what_runs_again(ranks: int, rate: float) -> None:
    gpu = replace(H100, network=30e9)
    weights = ShardedWeights(ranks=ranks, layers=32, layer=1600, embedding=160, tail=320, trained=480)
    share = (ranks - 1) / ranks / rate
    beside, in_the_way = sharded_seconds(weights, kept(32, 30, 0), gpu)
    assert beside == pytest.approx((2 * 32 * 1600 + 2 * 160 + 320 + 480) * share)
    assert in_the_way == pytest.approx(2 * 1600 * share)


class _Written(TorchDispatchMode):
    """Bytes that operators write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.copy_):
            self.nbytes += result.numel() * result.element_size()
        return result


@pytest.mark.parametrize("heads", [(8, 4, 4), (8,)])
def test_what_is_exchanged_is_copied_as_often_as_is_reckoned(
    heads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_to_all(output: Tensor, input: Tensor, group: Any) -> None:
        output.view(-1)[:] = 0

    monkeypatch.setattr("torch.distributed.all_to_all_single", all_to_all)
    group = SequenceParallelGroup(2, 0, object())
    parts = tuple(torch.zeros(1, 6, count, 16) for count in heads)
    nbytes = sum(part.numel() * part.element_size() for part in parts)
    with _Written() as to_heads:
        whole = group.seq_to_heads(*parts)
    made = [part.contiguous() for part in whole]  # attention's outputs and gradients are
    with _Written() as to_pieces:
        pieces = group.heads_to_seq(*made)
    assert [piece.shape for piece in pieces] == [part.shape for part in parts]
    assert 2 * to_heads.nbytes == COPY_PASSES * nbytes
    assert 2 * to_pieces.nbytes == COPY_PASSES * nbytes * (2 if len(heads) > 1 else 1)
    # Llama-8B's 32 and 8 heads: dq, dk, dv go back together.
    assert pytest.approx(COPY_PASSES * (1 + (32 + 2 * 8) / (6 * 32 + 6 * 8))) == ORDER_PASSES
