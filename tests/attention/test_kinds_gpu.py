"""Windows, softcap, sinks and widths on a GPU: right within twice plain bfloat16's error, in a model too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig

import tests.helpers.app_support  # noqa: F401  the scripts' folder is found by it
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.commands.accuracy import LOSS, Tensors, worst_of_run

pytestmark = pytest.mark.gpu
SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "sliding_window": 300,
}


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("cpu", "math")])
def test_every_kind_that_a_kernel_takes_is_right(name: str) -> None:
    from attention_kinds import DTYPE, HEADS, SOFTCAP, WINDOWS, _error, _spec

    cases = [
        (heads, window, softcap)
        for heads in HEADS
        for window in WINDOWS
        for softcap in (None, SOFTCAP)
        if KERNELS[name].why_not(torch.device("cuda"), DTYPE, _spec(heads, window, softcap)) is None
    ]
    if not cases:
        pytest.skip(f"{name} is not here")
    for heads, window, softcap in cases:
        for sinks in (False, True):
            torch.manual_seed(0)
            assert _error(KERNELS[name], heads, window, softcap, sinks=sinks) <= 2, (heads, window, softcap, sinks)


def a_step(model: Any, dtype: torch.dtype, plugin: FPDTPlugin | None = None) -> Tensors:
    model = copy.deepcopy(model).to("cuda", dtype)
    if plugin is not None:
        apply_fpdt(model, plugin)
    ids = torch.randint(0, 512, (1, 1500), generator=torch.Generator().manual_seed(0)).cuda()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {LOSS: loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["window", "sinks"])
@pytest.mark.parametrize("place", [{}, {"device_budget_gib": 0, "checkpoints": "segment"}])
def test_a_model_trains_as_the_plain_one(kind: str, place: dict[str, Any]) -> None:
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "sinks" else {}
    config: Any = (GptOssConfig if kind == "sinks" else MistralConfig)(**SIZES, **more)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "sinks" in name else 0.05)
    truth, plain = a_step(model, torch.float64), a_step(model, torch.bfloat16)
    ours = a_step(model, torch.bfloat16, FPDTPlugin(chunk_tokens=512, loss_chunk_tokens=512, **place))
    found = worst_of_run(ours, plain, truth)
    assert found.passed, found
