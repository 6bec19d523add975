"""Quantised weights, and weights on the host, of ranks that share a sequence."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_fpdt import FPDTPlugin, ShardingCollator
from hf_fpdt.training import FPDTAccelerator
from tests.helpers.models import TOLERANCE, Step, assert_same_step, tokens
from tests.helpers.quantised import dequantised_twin, tiny_quantised
from tests.helpers.support import spawn

pytest.importorskip("bitsandbytes")
CHUNK, LENGTH = 16, 63


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    made: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return made.double().train()


def step_of(model: nn.Module, loss: torch.Tensor) -> Step:
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
    return Step(loss.detach(), {name: grad for name, grad in named if grad is not None})


def _ranks(rank: int, world: int) -> None:
    """One sample of a pair of ranks; DDP leaves out what waits on the host."""
    ids = tokens(1, LENGTH)
    twin = with_lora(dequantised_twin(tiny_quantised("llama", "nf4")))
    whole = twin(input_ids=ids, labels=ids).loss
    whole.backward()
    for host_weights in (False, True):
        plugin = FPDTPlugin(chunk_tokens=CHUNK, sp_size=2, host_weights=host_weights)
        model = with_lora(tiny_quantised("llama", "nf4"))
        accelerator = FPDTAccelerator(cpu=True, fpdt_plugin=plugin)
        wrapped = accelerator.prepare_model(model)
        assert isinstance(wrapped, DistributedDataParallel)
        frozen = sum(".layers." in name and not p.requires_grad for name, p in model.named_parameters())
        assert len(wrapped.parameters_to_ignore) == frozen * host_weights
        batch = ShardingCollator(_stacked, 2, rank, CHUNK)([{"input_ids": ids[0], "labels": ids[0]}])
        loss = wrapped(**batch).loss
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        assert_same_step(step_of(wrapped, total / world), step_of(twin, whole), TOLERANCE)


def _stacked(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}


def test_ranks_have_the_gradients_of_the_dequantised_model() -> None:
    spawn(_ranks, 2)
