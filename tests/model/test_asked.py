"""What layers are seen to ask of attention: kernels refused before any step, heads planned for to the byte."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.attention import SCORE_BYTES
from hf_fpdt.memory.windowed_kv import WindowedKV
from hf_fpdt.model.apply import applied_settings
from hf_fpdt.model.settings import Settings
from hf_fpdt.plan.by_layer import AttentionSizes
from hf_fpdt.plan.placement import DEVICE_MARGIN
from tests.helpers.kinds import FAMILIES, kind, ring, with_adapters
from tests.helpers.live_bytes import live_bytes
from tests.helpers.models import CHUNK, tokens, train_step
from tests.helpers.support import assert_rejects

IDS = tokens(2, 37)


def applied(model: Any, **plugin: Any) -> Settings:
    apply_fpdt(model, FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, **plugin))
    settings = applied_settings(model)
    assert settings is not None
    return settings


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_memory", [False, True], ids=["on the CPU", "without memory"])
def test_a_named_kernel_that_cannot_serve_a_kind_is_refused_before_any_step(without_memory: bool) -> None:
    for name in ("gemma2", "vaultgemma"):
        model: Any = kind(name)
        before = type(model.model.layers[0]), model.config._attn_implementation
        model = model.to("meta") if without_memory else model
        with pytest.raises(NotImplementedError, match=r"kernel='cpu' does no softcap \(5.0\).* one that can: math"):
            apply_fpdt(model, FPDTPlugin(kernel="cpu"))
        assert (type(model.model.layers[0]), model.config._attn_implementation) == before
        apply_fpdt(model, FPDTPlugin(kernel="math"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model may be moved to the GPU")
def test_a_kernel_for_gpus_is_refused_at_once_where_there_is_none() -> None:
    for kernel in ("fa4", "flash", "efficient"):
        with pytest.raises(
            NotImplementedError, match=f"kernel='{kernel}' .*take kernel=\"auto\" or one that can: cpu"
        ):
            apply_fpdt(kind("mistral"), FPDTPlugin(kernel=kernel))


def test_a_model_that_was_moved_is_asked_again_before_its_first_layer() -> None:
    settings = applied(kind("mistral"), kernel="cpu")
    settings.check_kernel(torch.device("cpu"), torch.float64, is_sharded=False)
    with pytest.raises(NotImplementedError, match="kernel='cpu' runs on the CPU, not on cuda"):
        settings.check_kernel(torch.device("cuda"), torch.float32, is_sharded=False)


def test_a_window_that_no_sequence_reaches_is_no_reason() -> None:
    """It is plain attention, which kernels without windows serve."""
    windows = {}
    for window in (255, 256):  # the model ends at 256 positions
        settings = applied(kind("mistral", sliding_window=window))
        windows[window] = {asked.spec.window for asked in settings.asked}
        assert settings.sizes.windows == (window, window)
    assert windows == {255: {255}, 256: {None}}


def test_plain_pytorch_in_place_of_a_gpus_kernel_is_said_and_planned_for(caplog: pytest.LogCaptureFixture) -> None:
    """In fp32 no kernel of a GPU serves; none has to be here to see that."""
    settings = applied(kind("gemma2").float())
    hidden = torch.zeros(1, 8, 32)
    for _ in range(2):
        settings.check_kernel(torch.device("cpu"), torch.float32, is_sharded=False)
        settings.check_kernel(torch.device("cuda"), torch.float32, is_sharded=False)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "softcap 5.0 in torch.float32 on cuda, so it is done in plain PyTorch" in said[0]
    assert settings.step(hidden).score_bytes == 0 < SCORE_BYTES  # on the CPU
    settings.plain["cpu", torch.float32] = True
    step = settings.step(hidden)
    kv = step.kv_bytes(0)
    assert step.score_bytes == SCORE_BYTES < step.phase_bytes(kv, "backward")


# -- heads and bytes --------------------------------------------------------------------------------------------------


class Weighed(WindowedKV):
    """Remembers the most bytes of K, V, of their gradients and of copies for the kernel that were there in a pass."""

    peaks: dict[bool, int] = {}  # noqa: RUF012  emptied by each test

    def stream(self, spans: Any, *, with_grads: bool = False) -> Any:
        for span, k, v in super().stream(spans, with_grads=with_grads):
            yield span, k, v
            own = [part for pairs in (self._kv, self._grads) for pair in pairs.values() for part in pair]
            there = {part.data_ptr() for part in own}
            copies = [x for x in (k, v) if x.untyped_storage().data_ptr() not in there]
            held = sum(x.nbytes for x in (*own, *copies))
            self.peaks[with_grads] = max(held, self.peaks.get(with_grads, 0))


def attention_adapters(model: Any) -> Any:
    targets = r".*attn\.[qkvo]\w*proj\w*"
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=targets)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def held_and_planned(name: str, adapt: Any = attention_adapters) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a step with adapters and everything on the host: what was there, and what was planned."""
    ids = torch.randint(3, 80, (1, 96), generator=torch.Generator().manual_seed(0))
    model = adapt(kind(name, hidden_size=128, intermediate_size=192).float()).float()
    handle = apply_fpdt(
        model, FPDTPlugin(chunk_tokens=16, loss_chunk_tokens=16, device_budget_gib=0, host_budget_gib=1, fused=False)
    )
    train_step(model, ids)
    Weighed.peaks = {}
    with ring(Weighed), live_bytes() as counter:
        train_step(model, ids)
    (step, _), plan = next(iter(handle.store.plans.items()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = {
        "forward ring": Weighed.peaks.get(False, 0),
        "backward ring": Weighed.peaks.get(True, 0),
        "host": handle.store.used_bytes()["pinned"],
        "device": counter.peak,
    }
    planned = {
        "forward ring": plan.kv.forward_ring,
        "backward ring": plan.kv.backward_ring,
        "host": plan.forecast.host_bytes,
        # The gradients, and their sums over chunks.
        "device": int(DEVICE_MARGIN * step.working_bytes(plan.kv, resident=True)) + 2 * trained,
    }
    return held, planned


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_holds_what_is_planned_and_no_more(name: str) -> None:
    held, planned = held_and_planned(name)
    device = held.pop("device"), planned.pop("device")
    if name == "llama4_text":  # rows of a block read fewer keys than the chunks that it is in
        assert all(0 < held[key] <= planned[key] for key in held)
        return  # its experts compute every token, whichever it chose
    assert held == planned
    assert device[0] <= device[1]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v2", "mixtral"])
def test_experts_that_adapters_are_merged_into_are_planned_for(name: str) -> None:
    held, planned = held_and_planned(name, with_adapters)
    assert planned["device"] / 1.5 < held["device"] <= planned["device"]


def test_windowed_layers_with_heads_of_their_own_are_planned_by_them() -> None:
    """Of this model, whose configuration does not say so, they have twice the key heads."""
    if "mimo_v2_flash" not in FAMILIES:
        pytest.skip("this transformers has no such model")
    full, windowed = AttentionSizes(4, 2, 12, 8), AttentionSizes(4, 4, 12, 8)
    model = kind("mimo_v2_flash")
    for each in (model, kind("mimo_v2_flash").to("meta")):
        assert applied(each).sizes.heads == (windowed, full)

    held, planned = held_and_planned("mimo_v2_flash")

    def check(ring_bytes: int) -> None:
        assert held["backward ring"] == ring_bytes

    check(planned["backward ring"])
    assert_rejects(check, {"one size for all": planned["backward ring"] // 2})


def test_models_whose_layers_are_alike_have_no_heads_of_their_own() -> None:
    for name in ("gemma3_text", "deepseek_v3", "gpt_oss"):
        settings = applied(kind(name))
        assert settings.sizes.heads == () and len({asked.heads for asked in settings.asked}) == 1
