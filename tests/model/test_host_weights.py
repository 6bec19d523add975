"""Frozen weights in host memory: the same bits as resident ones, one layer ahead on the device, never written back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import hf_fpdt.model.weights.host as host
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.memory import Transfers
from hf_fpdt.model import waiting_names
from hf_fpdt.model.weights.quantised import packed_bytes
from tests.helpers.models import CHUNK, Step, assert_same_step, tokens, train_step
from tests.helpers.quantised import linears, tiny_plain, tiny_quantised
from tests.helpers.support import assert_rejects

IDS = tokens(1, 4 * CHUNK + 5)
SETTINGS: dict[str, Any] = {"chunk_tokens": CHUNK, "loss_chunk_tokens": 6}
RESIDENT, PLUGIN = FPDTPlugin(**SETTINGS), FPDTPlugin(**SETTINGS, host_weights=True)


def made(family: str = "llama", kind: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    if kind is None:
        return tiny_plain(family, dtype, **changes)
    pytest.importorskip("bitsandbytes")
    return tiny_quantised(family, kind, dtype, **changes)


def with_lora(model: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False).train()


def layers_of(model: Any) -> list[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(base.base_model.layers)


def same_bits(ours: Step, truth: Step) -> None:
    assert torch.equal(ours.loss, truth.loss) and ours.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        assert torch.equal(ours.grads[name], grad), name


@pytest.mark.parametrize(
    ("family", "kind", "when"),
    [
        ("llama", None, "after adapters"),
        ("qwen3_moe", None, "before"),  # experts of three dimensions
        ("gpt_neox", "nf4", "before"),  # biases
        ("llama", "int8", "after adapters"),
    ],
)
def test_steps_have_the_bits_of_resident_weights(family: str, kind: str | None, when: str) -> None:
    resident, model = with_lora(made(family, kind)), made(family, kind)
    apply_fpdt(resident, RESIDENT)
    truth = train_step(resident, IDS)
    if when == "after adapters":
        model = with_lora(model)
        handle = apply_fpdt(model, PLUGIN)
    else:
        handle = apply_fpdt(model, PLUGIN)
        model = with_lora(model)
    same_bits(train_step(model, IDS), truth)
    same_bits(train_step(model, IDS), truth)
    handle.remove()
    apply_fpdt(model, RESIDENT)
    same_bits(train_step(model, IDS), truth)


@pytest.mark.parametrize("checkpoints", ["auto", "segment"])
def test_two_layers_are_on_the_device_and_the_next_one_is_there_in_time(
    checkpoints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fetch but the first is asked for a layer ahead, in backward and where inputs are rebuilt too."""
    model = with_lora(made(num_hidden_layers=6))
    handle = apply_fpdt(model, FPDTPlugin(**SETTINGS, host_weights=True, checkpoints=checkpoints))
    weights = handle._settings.host_weights
    assert weights is not None
    most, late, entered, between = [0], list[int](), list[int](), [True]
    original, replaced = weights._fetch, host.HostLayer.replaced

    def fetch(index: int, device: torch.device) -> None:
        original(index, device)
        late.extend([index] if between[0] else [])
        most[0] = max(most[0], weights.on_device)

    @contextmanager
    def inside(self: Any, filled: Tensor) -> Iterator[None]:
        entered.append(layers_of(model).index(self.layer))
        with replaced(self, filled):
            between[0] = False  # the next layer is asked for when the weights of this one are in place
            yield
            between[0] = True

    monkeypatch.setattr(weights, "_fetch", fetch)
    monkeypatch.setattr(host.HostLayer, "replaced", inside)
    train_step(model, IDS)
    (plan,) = handle.store.plans.values()
    assert entered[:6] == list(range(6)) and entered[-1] == 0 and len(entered) == 12 + plan.kept.rebuilt
    assert (plan.kept.rebuilt > 0) == (checkpoints == "segment")
    assert late == [0] and most[0] <= 2 * weights.largest and weights.on_device == 0
    (step, _), _ = next(iter(handle.store.plans.items()))
    rows = [row.nbytes for row in step.device_rows(plan.kv) if row.kind == "weights" and "backward" in row.phases]
    assert rows == [2 * weights.largest]


def test_the_planned_bytes_are_the_real_ones() -> None:
    """Packed bytes travel; each tensor begins at a multiple of 256."""
    model = with_lora(made("llama", "nf4"))
    handle = apply_fpdt(model, PLUGIN)
    weights = handle._settings.host_weights
    assert weights is not None and handle._settings.sizes.fetched_bytes == weights.largest
    modules = layers_of(model)[0].modules()
    frozen = [(m, p) for m in modules for p in m._parameters.values() if p is not None and not p.requires_grad]
    sizes = [t.numel() * t.element_size() for m, p in frozen for t in host.parts_of(m, p)]
    assert len(frozen) == 9 and weights.largest == sum(-(-size // 256) * 256 for size in sizes)
    assert weights.nbytes == sum(-(-layer.nbytes // 4096) * 4096 for layer in weights._layers.values())
    assert sum(sizes) < 1.3 * sum(map(packed_bytes, linears(layers_of(model)[0]).values()))


def test_broken_ways_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer before's weights, a copy that is used before it is there, and one that outlives a change."""
    resident, model = with_lora(made()), with_lora(made())
    apply_fpdt(resident, RESIDENT)
    truth = train_step(resident, IDS)
    handle = apply_fpdt(model, PLUGIN)
    weights: Any = handle._settings.host_weights

    def broken(to_device: Callable[..., Any]) -> Step:
        with monkeypatch.context() as patch:
            patch.setattr(Transfers, "to_device", to_device)
            return train_step(model, IDS)

    original, buffers = Transfers.to_device, [layer.buffer for layer in weights._layers.values()]

    def of_another_layer(self: Any, buffer: Tensor, *rest: Any) -> Any:
        return original(self, buffers[0], *rest)

    def too_early(self: Any, buffer: Tensor, *rest: Any) -> Any:
        return original(self, torch.zeros_like(buffer), *rest)

    same_bits(train_step(model, IDS), truth)
    assert_rejects(
        lambda step: assert_same_step(step, truth),
        {"another layer's": broken(of_another_layer), "not there yet": broken(too_early)},
    )


def test_changed_weights_are_fetched_anew() -> None:
    """Merged into, replaced, or cast: what is computed with is what the layer has now."""
    resident, model = with_lora(made()), with_lora(made())
    apply_fpdt(resident, RESIDENT)
    apply_fpdt(model, PLUGIN)
    train_step(model, IDS)
    for each in (resident, model):
        each.merge_adapter()
        each.unmerge_adapter()
        first = layers_of(each)[0]
        first.input_layernorm.weight.data = 2 * first.input_layernorm.weight.data
        with torch.no_grad():
            layers_of(each)[1].mlp.down_proj.base_layer.weight.mul_(0.5)
    same_bits(train_step(model, IDS), train_step(resident, IDS))
    resident.double(), model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    same_bits(train_step(model, IDS), train_step(resident, IDS))


def test_a_model_that_is_moved_leaves_its_weights_on_the_host() -> None:
    """Adapters, embeddings and head go; on a meta device, so that what was moved shows."""
    model = made("llama", "nf4")
    apply_fpdt(model, PLUGIN)
    model = with_lora(model)
    model._apply(lambda tensor: tensor.to("meta"))
    stayed = {name for name, p in model.named_parameters() if not p.is_meta}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and ".layers." in name}
    assert stayed == frozen and len(linears(model)) == 14


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_torch_saves_each_weight_by_itself(kind: str | None, tmp_path: Path) -> None:
    """A layer's buffer has weights of several dtypes, and a file has each of them alone."""
    sizes = []
    for plugin in (RESIDENT, PLUGIN):
        model = made("llama", kind)
        layers_of(model)[0].input_layernorm.double()
        apply_fpdt(model, plugin)
        torch.save(model.state_dict(), tmp_path / "all")
        torch.save(layers_of(model)[1].input_layernorm.weight, tmp_path / "one")
        sizes.append([(tmp_path / name).stat().st_size for name in ("all", "one")])
    (all_resident, one_resident), (all_waiting, one_waiting) = sizes
    assert abs(all_waiting - all_resident) < 1000 and one_waiting < one_resident + 200
    saved = torch.load(tmp_path / "all")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_states_are_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    apply_fpdt(model, PLUGIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    model = with_lora(model)
    truth = train_step(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded.train(), tmp_path / "adapter", is_trainable=True)
    apply_fpdt(again, PLUGIN)
    same_bits(train_step(again, IDS), truth)


def test_evaluation_and_generation_have_the_bits_too() -> None:
    resident, model = made().eval(), made().eval()
    apply_fpdt(resident, RESIDENT)
    apply_fpdt(model, PLUGIN)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, resident(IDS).logits)
        assert torch.equal(model.generate(IDS, **how), resident.generate(IDS, **how))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_adapters_come_and_go_and_never_wait(kind: str | None, tmp_path: Path) -> None:
    """A disabled one, as a reference in DPO, and one that is not active are frozen, and train again later."""
    resident, model = made("llama", kind), made("llama", kind)
    apply_fpdt(resident, RESIDENT)
    handle = apply_fpdt(model, PLUGIN)
    resident, model = with_lora(resident), with_lora(model)
    weights: Any = handle._settings.host_weights
    model.save_pretrained(tmp_path)
    before = train_step(resident, IDS)
    same_bits(train_step(model, IDS), before)
    waiting = weights.nbytes
    for each in (resident, model):
        with each.disable_adapter(), torch.no_grad():
            each(input_ids=IDS, labels=IDS)
    same_bits(train_step(model, IDS), before)
    for each in (resident, model):
        each.load_adapter(tmp_path, "second", is_trainable=True)
    same_bits(train_step(model, IDS), before)
    for each in (resident, model):
        each.set_adapter("second")
    same_bits(train_step(model, IDS), train_step(resident, IDS))
    for each in (resident, model):
        each.set_adapter("default")
    same_bits(train_step(model, IDS), before)
    assert weights.nbytes == waiting and not any("lora" in name for name in waiting_names(model))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_norms_that_train_later_go_where_the_model_goes(kind: str | None) -> None:
    resident, model = made("llama", kind), made("llama", kind)
    apply_fpdt(resident, RESIDENT)
    handle = apply_fpdt(model, PLUGIN)
    resident, model = with_lora(resident), with_lora(model)
    train_step(model, IDS)
    for each in (resident, model):
        for layer in layers_of(each):
            layer.input_layernorm.weight.requires_grad_(True)
    step = train_step(model, IDS)
    same_bits(step, train_step(resident, IDS))
    assert sum("input_layernorm" in name for name in step.grads) == 2
    assert not any("input_layernorm" in name for name in waiting_names(model))
    weights: Any = handle._settings.host_weights
    first = layers_of(model)[0]
    buffers = [layer.buffer for layer in weights._layers.values()]
    assert not any(_lies_in(first.input_layernorm.weight, buffer) for buffer in buffers)
    assert any(_lies_in(first.post_attention_layernorm.weight, buffer) for buffer in buffers)
    model._apply(lambda tensor: tensor.to("meta"))
    assert first.input_layernorm.weight.is_meta and not first.post_attention_layernorm.weight.is_meta


def _lies_in(tensor: Tensor, buffer: Tensor) -> bool:
    return buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.numel()


def test_weights_that_train_are_refused() -> None:
    model = made()
    apply_fpdt(model, PLUGIN)
    with pytest.raises(NotImplementedError, match=r"self_attn.q_proj.weight of layer 0 trains: freeze it"):
        train_step(model, IDS)


def test_what_the_host_does_not_hold_is_refused_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(made())
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    monkeypatch.setattr(host, "host_bytes_available", lambda: 1000)
    with pytest.raises(MemoryError, match="GiB more are needed, and 0.0 GiB are available"):
        apply_fpdt(model, PLUGIN)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    apply_fpdt(model, RESIDENT)


def test_weights_that_fsdp_shards_are_refused() -> None:
    model = with_lora(made())
    apply_fpdt(model, PLUGIN)
    layer = layers_of(model)[0]
    layer.unshard = layer.reshard = lambda: None
    with pytest.raises(NotImplementedError, match="that wait on the host, are not supported under FSDP2"):
        train_step(model, IDS)


def test_adapters_that_are_not_where_the_model_computes_are_named() -> None:
    """PEFT puts them where the weights are: on the host."""
    model = made()
    handle = apply_fpdt(model, PLUGIN)
    model, weights = with_lora(model), handle._settings.host_weights
    assert weights is not None
    with pytest.raises(RuntimeError, match=r"q_proj.lora_A.default.weight is no such .* call model.to\('cuda'\)"):
        weights.check_adapters(layers_of(model)[0], torch.device("cuda"))


def test_a_copied_model_is_refused_and_copied_modules_are_not() -> None:
    model = made()
    apply_fpdt(model, PLUGIN)
    copied = with_lora(model, modules_to_save=["post_attention_layernorm"])
    assert train_step(copied, IDS).grads
    twin = copy.deepcopy(copied)
    with pytest.raises(RuntimeError, match="is a copy of one: copy the model before FPDT is applied"):
        train_step(twin, IDS)


def test_recast_weights_do_not_pile_up() -> None:
    model = with_lora(made(dtype=torch.bfloat16))
    handle = apply_fpdt(model, PLUGIN)
    weights = handle._settings.host_weights
    assert weights is not None
    before = weights.nbytes
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        train_step(model, IDS)
        assert weights.nbytes <= 2 * before + 2 * 4096


def test_a_copy_that_waited_for_a_backward_pass_is_not_used_in_another_forward_pass() -> None:
    """PEFT merges into `weight.data`, which no count of writes tells of."""
    for layers in (1, 2):
        resident, model = (with_lora(made(num_hidden_layers=layers)) for _ in range(2))
        apply_fpdt(resident, RESIDENT)
        apply_fpdt(model, PLUGIN)
        losses = []
        for each in (resident, model):
            each(input_ids=IDS, labels=IDS)  # nobody calls backward
            each.merge_adapter()
            losses.append(each(input_ids=IDS, labels=IDS).loss.detach())
        assert torch.equal(*losses)


def test_an_error_in_a_layer_leaves_nothing_on_the_device() -> None:
    model = with_lora(made())
    handle = apply_fpdt(model, PLUGIN)
    weights = handle._settings.host_weights
    assert weights is not None
    train_step(model, IDS)
    hook = layers_of(model)[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(input_ids=IDS)
    hook.remove()
    assert weights.on_device == 0
    assert all(p.data_ptr() for p in model.parameters())
    train_step(model, IDS)


def test_a_model_that_is_cast_before_adapters_waits_on_the_host_again() -> None:
    model = made()
    handle = apply_fpdt(model, PLUGIN)
    model.double()
    twin = made(dtype=torch.float64)
    with torch.no_grad():
        assert (model(IDS).logits - twin(IDS).logits).abs().max() < 1e-3
    weights = handle._settings.host_weights
    assert weights is not None and all(layer.nbytes > 8 * 32 * 48 for layer in weights._layers.values())
