"""Whole models on a GPU in bfloat16: two widths of heads, heads of 512, softcap, sinks and windows.

Loss and every gradient may be twice as far from float64 as plain Hugging Face's in bfloat16.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.commands.accuracy import LOSS, Tensors, Worst, worst_of_run
from hf_fpdt.model.apply import applied_settings
from tests.helpers.kinds import FAMILIES, dropped, kind, sinks_of
from tests.helpers.models import scaled_attention, tiny, tokens

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WINDOW, FAR = 9, 700  # within a chunk, and of several
SIZES: Mapping[str, Any] = {
    "hidden_size": 512, "intermediate_size": 256, "vocab_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
# Every token visits every expert: who is routed by rounding alone says nothing of attention.
WIDE: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 2,
    },
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 512},
    "gemma2": {"num_attention_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip
CASES = [
    ("deepseek_v2", "auto"), ("deepseek_v2", "flash"), ("llama", "efficient"), ("gemma2", "auto"), ("gemma2", "math"),
    ("gpt_oss", "auto"), ("gpt_oss", "flash"),
]  # fmt: skip
PLACES: Mapping[str, dict[str, Any]] = {
    "device": {},
    "host, in segments": {"device_budget_gib": 0, "host_budget_gib": 4, "checkpoints": "segment"},
}
GAIN = {"llama": 0.12}  # of weights that are drawn for narrow models, where it is not 0.2
SINKS = 6  # as large as scores
TOKENS, CHUNK = 1500, 512


def wide(name: str, **changes: Any) -> Any:
    """A model of the family with the heads that its large ones have; its weights are exact in bfloat16."""
    config = {**SIZES, **WIDE[name], **changes}
    model = kind(name, **config) if name in FAMILIES else tiny(name, attention="eager", **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (GAIN.get(name, 0.2) if parameter.dim() > 1 else 1)).bfloat16())
        for sinks in sinks_of(model):
            sinks.add_(SINKS)
    return model


def a_step(model: Any, dtype: torch.dtype, plugin: FPDTPlugin | None = None, **arguments: Any) -> Tensors:
    """Loss and gradients of a copy."""
    model = copy.deepcopy(model).to(DEVICE, dtype)
    if plugin is not None:
        apply_fpdt(model, plugin)
    ids = tokens(1, TOKENS).to(DEVICE)
    loss = model(input_ids=ids, labels=ids, **arguments).loss
    loss.backward()
    return {LOSS: loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def broken(name: str, changes: Mapping[str, Any]) -> dict[str, Tensors]:
    """Steps of plain models with the mistakes that these kinds invite."""
    model = wide(name, **changes)
    wrong = {}
    if "sliding_window" in changes:
        others = (WINDOW - 1, WINDOW + 1) if changes["sliding_window"] == WINDOW else (FAR // 20,)
        wrong = {f"window {other}": wide(name, **{**changes, "sliding_window": other}) for other in others}
    if sinks_of(model) and changes["sliding_window"] == WINDOW:  # beside few keys they count most
        wrong["no sinks"] = dropped(model)
    if name == "gemma2":
        wrong["no softcap"] = wide(name, **changes, attn_logit_softcapping=1e6)
    steps = {which: a_step(each, torch.bfloat16) for which, each in wrong.items()}
    if not changes:
        steps["a chunk that later ones do not see"] = a_step(model, torch.bfloat16, attention_mask=without_a_chunk())
    with scaled_attention(model, 1.6):
        return {**steps, "wrong scale": a_step(model, torch.bfloat16)}


def without_a_chunk() -> torch.Tensor:
    """What eager attention adds to scores."""
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[2 * CHUNK :, :CHUNK] = False
    return torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16, device=DEVICE).masked_fill(~seen.to(DEVICE), -1e30)


@pytest.mark.parametrize("window", [WINDOW, FAR])
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_a_model_is_as_accurate_as_the_plain_one(name: str, kernel: str, window: int) -> None:
    if name not in ("gemma2", "gpt_oss") and window == FAR:
        pytest.skip("it has no window")
    changes = {"sliding_window": window} if name in ("gemma2", "gpt_oss") else {}
    model = wide(name, **changes)
    truth, plain = a_step(model, torch.float64), a_step(model, torch.bfloat16)

    def found(step: Tensors) -> Worst:
        return worst_of_run(step, plain, truth)

    for which, place in PLACES.items():
        worst = found(a_step(model, torch.bfloat16, FPDTPlugin(chunk_tokens=CHUNK, kernel=kernel, **place)))
        print(f"{name}, {kernel}, window {window}, {which}: {worst.ratio:.2f} ({worst.name})")
        assert worst.passed, (which, worst)
    for which, step in broken(name, changes).items():
        worst = found(step)
        print(f"  {which}: {worst.ratio:.2f} ({worst.name})")
        assert not worst.passed, f"{which} passes"


def test_a_model_moved_to_the_gpu_is_refused_before_its_first_layer() -> None:
    model = wide("gpt_oss").bfloat16()
    apply_fpdt(model, FPDTPlugin(kernel="cpu"))  # it may stay where it is
    ids = tokens(1, 40).to(DEVICE)
    with pytest.raises(NotImplementedError, match="kernel='cpu' runs on the CPU, not on cuda"):
        model.to(DEVICE)(input_ids=ids, labels=ids)
    with pytest.raises(NotImplementedError, match=r"kernel='flash' does no softcap \(5.0\)"):
        apply_fpdt(wide("gemma2").bfloat16(), FPDTPlugin(kernel="flash"))


def test_plain_pytorch_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """No kernel of a GPU takes fp32."""
    model = wide("gpt_oss").float().to(DEVICE)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK))
    ids = tokens(1, 600).to(DEVICE)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in said if "so it is done in plain PyTorch" in text]) == 1
    settings = applied_settings(model)
    assert settings is not None and settings.step(torch.zeros(1, 600, 512, device=DEVICE)).score_bytes > 0
