"""What apply_fpdt refuses, and that remove() leaves nothing behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LilyConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

import hf_fpdt.memory.device_tiers
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.config import auto_chunk_tokens
from hf_fpdt.parallel.group import SequenceParallelGroup
from hf_fpdt.plan.placement import DEVICE_MARGIN, DEVICE_RESERVE, NO_LIMIT, Available
from tests.helpers.models import (
    PLUGIN,
    SIZES,
    TOLERANCE_FP32,
    VOCAB,
    Step,
    assert_same_step,
    taken_step,
    tiny,
    tokens,
    train_step,
)
from tests.helpers.support import assert_rejects, spawn

IDS = tokens(2, 37)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What apply_fpdt may change in any module: its class, its attributes, its forward; and the config."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    modules: dict[str, Any] = {
        name: (type(module), sorted(vars(module)), getattr(module, "gradient_checkpointing", None), module.forward)
        for name, module in model.named_modules()
    }
    return {**modules, "config": copy.deepcopy(base.config.to_dict()), "more": copy.deepcopy(vars(base.config))}


def lora(model: PreTrainedModel, **changes: Any) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)
    )


def checkpointing_off_again(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    return model


def checkpointing_on(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable()
    return model


def own_forward(model: PreTrainedModel) -> PreTrainedModel:
    """Somebody else's patch below ours."""
    model.forward = model.forward
    return model


PREPARED: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny,
    "eager": lambda: tiny(attention="eager"),
    "fpdt already": lambda: tiny(attention="fpdt"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "without head": lambda: tiny(auto=AutoModel),
    "lora": lambda: lora(tiny()),
    "checkpointing on": lambda: checkpointing_on(tiny()),
    "checkpointing off again": lambda: checkpointing_off_again(tiny()),
    "patched before": lambda: own_forward(tiny()),
}


@pytest.mark.parametrize("case", PREPARED)
@pytest.mark.parametrize("used", [False, True])
def test_remove_restores_the_model_exactly(case: str, used: bool) -> None:
    model = PREPARED[case]()
    before, logits = state_of(model), model(input_ids=IDS)[0]
    handle = apply_fpdt(model, PLUGIN)
    assert state_of(model) != before, "this test sees no change at all"
    if used:
        model(input_ids=IDS)[0].sum().backward()
        with torch.no_grad():
            model(input_ids=IDS)
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(model(input_ids=IDS)[0], logits)
    handle.remove()
    assert state_of(model) == before


def llava() -> PreTrainedModel:
    """A text decoder beside a vision tower that is not causal."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=VOCAB - 1)
    attention = {"text_config": "sdpa", "vision_config": "eager"}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return model.to(torch.float64).train()


def test_the_decoder_of_a_vision_model_is_trained_and_its_tower_left_alone() -> None:
    ids = tokens(1, 37).clamp(max=VOCAB - 2)
    ids[0, 5:9] = VOCAB - 1  # four patches of the image
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    model = llava()
    truth, other_image = (train_step(model, ids, pixel_values=pixels) for pixels in (image, -image))
    before = state_of(model)  # after a first pass: transformers leaves a note in modules whose outputs it captures
    handle = apply_fpdt(model, PLUGIN)
    assert model.config.vision_config._attn_implementation == "eager"
    assert_same_step(train_step(model, ids, pixel_values=image), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), {"another image": other_image})
    handle.remove()
    assert state_of(model) == before
    assert model.config.text_config._attn_implementation == "sdpa"


class NormedEmbedding(nn.Embedding):
    """As Muse's: a norm by its name, and given ids."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


def test_an_embedding_that_norms_is_no_norm_of_hidden_states() -> None:
    model = tiny()
    model.get_input_embeddings().__class__ = NormedEmbedding
    truth = train_step(model, IDS)
    apply_fpdt(model, PLUGIN)
    assert_same_step(train_step(model, IDS), truth)


def test_fpdt_can_be_applied_again_after_remove() -> None:
    model = tiny()
    first = apply_fpdt(model, PLUGIN)
    first.remove()
    second = apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    applied = state_of(model)
    first.remove()
    assert state_of(model) == applied, "an old handle has nothing left to remove"
    assert_same_step(train_step(model, IDS), train_step(tiny(), IDS))
    second.remove()
    assert state_of(model).keys() == state_of(tiny()).keys()


def test_what_was_asked_for_meanwhile_is_kept() -> None:
    model = tiny()
    handle = apply_fpdt(model, PLUGIN)
    model.gradient_checkpointing_enable()
    handle.remove()
    assert model.is_gradient_checkpointing and model.model.layers[0].gradient_checkpointing


def test_remove_after_peft_also_restores_its_copies() -> None:
    model = tiny()
    handle = apply_fpdt(model, PLUGIN)
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "lm_head", "embed_tokens"])
    )
    step = train_step(peft, IDS)
    assert any("modules_to_save" in name and "norm" in name for name in step.grads)
    handle.remove()
    left = [name for name, module in peft.named_modules() if {"_fpdt", "forward"} & vars(module).keys()]
    assert left == []
    assert_same_step(train_step(peft, IDS), step)


def test_remove_waits_until_accelerate_is_undone() -> None:
    model = tiny(dtype=torch.float32)
    handle = apply_fpdt(model, PLUGIN)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    applied = state_of(model)
    with pytest.raises(RuntimeError, match="unwrap_model"):
        handle.remove()
    assert state_of(model) == applied, "a refused remove() changed something"
    assert prepared(input_ids=IDS, labels=IDS).loss.isfinite()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    handle.remove()
    assert type(model.model.layers[0]) is type(tiny().model.layers[0]) and "forward" not in vars(model)


def test_a_second_apply_is_refused_and_changes_nothing() -> None:
    model = tiny()
    apply_fpdt(model, PLUGIN)
    before = state_of(model)
    for wrapped in (model, model.model):
        with pytest.raises(RuntimeError, match="call remove"):
            apply_fpdt(wrapped, PLUGIN)
    assert state_of(model) == before


def test_the_handle_says_in_one_line_what_was_applied() -> None:
    handle = apply_fpdt(tiny(), FPDTPlugin(chunk_tokens=4096, checkpoints="input"))
    said = str(handle)
    assert "\n" not in said and all(word in said for word in ("2 layers", "4,096 tokens", "'input'"))


@pytest.mark.parametrize(
    ("has_gpu", "chunk"),
    [(False, "of 4,096 tokens on a CPU;"), (True, "of 32,768 tokens on a GPU, 4,096 tokens on a CPU;")],
)
def test_the_chunk_of_auto_is_the_one_that_will_be(has_gpu: bool, chunk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU may be moved to a GPU, where there is one."""
    handle = apply_fpdt(tiny(), FPDTPlugin())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert chunk in str(handle)


# -- refusals ---------------------------------------------------------------------------------------------------------

FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
MUSICGEN = MusicgenConfig(
    text_encoder={"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    audio_encoder={"model_type": "encodec", "num_filters": 2, "hidden_size": 16, "codebook_size": 64},
    decoder={"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16},
)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention dropout": (lambda: tiny(attention_dropout=0.1), "attention_dropout=0.0"),
    "attention dropout by another name": (lambda: tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0), "attn_pdrop=0.0"),
    "no attention": (lambda: without_heads(tiny("xlstm", attention="eager", num_heads=4)), "no num_attention_heads"),
    "two text models": (lambda: MusicgenForConditionalGeneration(MUSICGEN), "['text_encoder', 'decoder']"),
    "router loss": (lambda: tiny(output_router_logits=True), "output_router_logits=False"),
    "Mamba-1": (lambda: tiny("mamba", attention="eager", state_size=4), "Mamba-1"),
    "own attention": (lambda: tiny("bloom", attention="eager", n_layer=2), "ignores the attention registry"),
    "encoder": (lambda: tiny("bert", auto=AutoModel), "no stack of decoder layers"),
    "masked language model": (lambda: tiny("modernbert", auto=AutoModelForMaskedLM), "ForCausalLMLoss"),
    "causality off": (lambda: causality_off(tiny()), "not causal"),
    "own loss": (lambda: own_loss(tiny()), "ForCausalLMLoss"),
    "own forward": (lambda: OwnForward(LlamaConfig(**SIZES)), "not one of transformers' own"),
    "forward on the instance": (
        lambda: with_forward(tiny()),
        "tests.model.test_apply) is not one of transformers' own",
    ),
    "decorated forward": (
        lambda: with_forward(tiny(), deco=True),
        "tests.model.test_apply) is not one of transformers' own",
    ),
    "aLoRA": (lambda: lora(tiny(), alora_invocation_tokens=[7, 8], target_modules=["q_proj"]), "aLoRA"),
    "Lily": (lambda: get_peft_model(tiny(), LilyConfig(r=4, target_modules=["q_proj"])), "type lily"),
    "several devices": (lambda: dispatched(tiny()), "load the model on one device"),
    "checkpoint wrapper": (lambda: checkpoint_wrapped(tiny()), "fsdp_activation_checkpointing: false"),
}


def with_forward(model: PreTrainedModel, *, deco: bool = False) -> PreTrainedModel:
    """As people put a term of their own into the loss; with transformers' name, or with `deco` a wrapper of theirs."""
    stock = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    named = can_return_tuple(forward) if deco else functools.wraps(type(model).forward)(forward)
    model.forward = MethodType(named, model)
    return model


class OwnForward(LlamaForCausalLM):
    """Its loss is its own affair."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.logits.square().mean()
        return output


def causality_off(model: PreTrainedModel) -> PreTrainedModel:
    model.config.is_causal = False
    return model


def without_heads(model: PreTrainedModel) -> PreTrainedModel:
    del model.config.num_attention_heads
    return model


def own_loss(model: PreTrainedModel) -> PreTrainedModel:
    model.loss_function = lambda logits, labels, **_: logits.sum()
    return model


def dispatched(model: PreTrainedModel) -> PreTrainedModel:
    """As from_pretrained(device_map=…) over several devices leaves it."""
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    return model


def checkpoint_wrapped(model: PreTrainedModel) -> PreTrainedModel:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    assert isinstance(model.model.layers[0], CheckpointWrapper)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_exact_is_refused_unchanged(case: str) -> None:
    make, reason = REFUSED[case]
    model = make()
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="FPDT cannot run") as refused:
        apply_fpdt(model, PLUGIN)
    assert reason in str(refused.value)
    assert state_of(model) == before


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 2.0}
NOT_SHARED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "dynamic": (lambda: tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
    "longrope": (
        lambda: tiny(rope_parameters=LONGROPE | {"rope_theta": 1e4, "original_max_position_embeddings": 16}),
        "longrope",
    ),
    "token labels": (lambda: tiny(auto=AutoModelForTokenClassification), "no language model's"),
}


@pytest.mark.parametrize("case", NOT_SHARED)
def test_what_ranks_cannot_share_is_refused_for_them_alone(case: str) -> None:
    make, reason = NOT_SHARED[case]
    model = make()
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="with sp_size above 1") as refused:
        apply_fpdt(model, FPDTPlugin(sp_size=2, chunk_tokens=16), SequenceParallelGroup(size=2))
    assert reason in str(refused.value) and state_of(model) == before
    apply_fpdt(model, PLUGIN).remove()


def test_every_reason_is_named_at_once() -> None:
    model = tiny(output_router_logits=True, attention_dropout=0.1)
    with pytest.raises(NotImplementedError, match="dropout.*router"):
        apply_fpdt(model, FPDTPlugin())


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_version_1_is_refused(process_group: None) -> None:
    inner = tiny(dtype=torch.float32)
    inner.model.layers[0] = FullyShardedDataParallel(inner.model.layers[0], device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="use FSDP2"):
        apply_fpdt(inner, PLUGIN)


@pytest.mark.parametrize("wrap", [FullyShardedDataParallel, nn.parallel.DistributedDataParallel])
def test_a_wrapped_model_is_refused_before_the_wrapper(process_group: None, wrap: Any) -> None:
    on_cpu = {"device_id": torch.device("cpu")} if wrap is FullyShardedDataParallel else {}
    with pytest.raises(TypeError, match="before the model is wrapped"):
        apply_fpdt(wrap(tiny(dtype=torch.float32), **on_cpu), PLUGIN)


def sharded(model: PreTrainedModel, tail: list[str], **options: Any) -> PreTrainedModel:
    """FSDP2 as accelerate does it: each layer, the modules named in `tail` together, and the rest."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if tail:
        fully_shard([model.get_submodule(name) for name in tail], mesh=mesh, **options)
    fully_shard(model, mesh=mesh)
    return model


KEPT = {"reshard_after_forward": False}
FSDP2: dict[str, tuple[list[str], dict[str, bool]]] = {
    "tail in the root's unit": ([], {}),
    "norm and head": (["model.norm", "lm_head"], KEPT),
    "head": (["lm_head"], KEPT),
    "norm": (["model.norm"], {}),
}


@pytest.mark.parametrize("layout", FSDP2)
def test_fsdp2_after_apply_trains_every_parameter(layout: str, process_group: None) -> None:
    tail, options = FSDP2[layout]
    model = sharded(applied(dtype=torch.float32), tail, **options)
    for _ in range(2):
        step = train_step(model, IDS)
        gradients = {name: cast(DTensor, grad).full_tensor() for name, grad in step.grads.items()}
        assert_same_step(Step(step.loss, gradients), train_step(tiny(dtype=torch.float32), IDS), TOLERANCE_FP32)


def test_a_head_that_fsdp2_reshards_at_once_is_refused(process_group: None) -> None:
    """It would get no gradient."""
    model = sharded(applied(dtype=torch.float32), ["model.norm", "lm_head"], reshard_after_forward=True)
    with pytest.raises(NotImplementedError, match="reshard_after_forward=False"):
        train_step(model, IDS)


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_ddp_after_apply_accumulates_every_gradient(find_unused_parameters: bool, process_group: None) -> None:
    model, reference = applied(dtype=torch.float32), tiny(dtype=torch.float32)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    for module in (wrapped, wrapped, reference, reference):
        loss = module(input_ids=IDS, labels=IDS).loss
        loss.backward()
    assert_same_step(taken_step(model, loss), taken_step(reference, loss), TOLERANCE_FP32)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="transformers model"):
        apply_fpdt(nn.Linear(2, 2), PLUGIN)


def test_liger_fused_loss_is_refused() -> None:
    """In a process of its own: Liger replaces classes of transformers for all models."""
    pytest.importorskip("liger_kernel.transformers")
    spawn(_liger_refused, 1)


def _liger_refused(rank: int, world: int) -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    model = tiny(dtype=torch.float32)
    liger._apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True)
    with pytest.raises(NotImplementedError, match="fused_linear_cross_entropy=False"):
        apply_fpdt(model, PLUGIN)


# -- refusals at the call ---------------------------------------------------------------------------------------------


def applied(*args: Any, **kwargs: Any) -> PreTrainedModel:
    model = tiny(*args, **kwargs)
    apply_fpdt(model, PLUGIN)
    return model


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "4-D mask": ({"attention_mask": torch.ones(37, 37).tril().bool().expand(2, 1, -1, -1)}, "pad on the right"),
    "left padding": ({"attention_mask": (torch.arange(37) > 4).long().expand(2, -1)}, "pad on the right"),
    "packed lengths of several rows": (
        {"cu_seq_lens_q": torch.tensor([0, 20, 37])},
        "cu_seq_lens_q marks documents of",
    ),
    "those of keys alone": ({"cu_seq_lens_k": torch.tensor([0, 20, 37])}, "cu_seq_lens_k marks documents of one row"),
    "attention weights": ({"output_attentions": True}, "output_attentions off"),
    "router logits": ({"output_router_logits": True}, "output_router_logits=False"),
    "not causal": ({"is_causal": False}, "causal"),
}


@pytest.mark.parametrize("case", CALLS)
def test_an_argument_that_cannot_be_exact_is_refused(case: str) -> None:
    arguments, reason = CALLS[case]
    model = applied()
    with pytest.raises(NotImplementedError) as refused:
        model(input_ids=IDS, labels=IDS, **arguments)
    assert reason.lower() in str(refused.value).lower()
    assert_same_step(train_step(model, IDS), train_step(tiny(), IDS))  # the refused call left nothing behind


def test_settings_that_change_after_apply_are_refused_at_the_call() -> None:
    model = own_loss(applied())
    with pytest.raises(NotImplementedError, match="without labels"):
        model(input_ids=IDS, labels=IDS)
    model = applied()
    model.config.output_router_logits = True
    with pytest.raises(NotImplementedError, match="output_router_logits=False"):
        model(input_ids=IDS, labels=IDS)


def test_adapters_that_look_at_the_sequence_are_refused_when_they_come_later() -> None:
    model = lora(applied(), alora_invocation_tokens=[7, 8], target_modules=["q_proj"])
    with pytest.raises(NotImplementedError, match="layer 0 .* cannot be run in chunks: activated LoRA"):
        model(input_ids=IDS, labels=IDS)


def test_fragments_of_router_logits_are_refused_of_the_base_model_too() -> None:
    model = applied("mixtral", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="output_router_logits=False"):
        model.model(input_ids=IDS, output_router_logits=True)


MODES: dict[str, Callable[[Any], Any]] = {
    "adapters off": lambda model: model.base_model.disable_adapter_layers(),
    "another adapter": lambda model: model.set_adapter("other"),
    "evaluation": lambda model: model.eval(),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("case", MODES)
def test_modes_that_change_before_backward_are_refused(case: str) -> None:
    model: Any = lora(applied())
    model.add_adapter("other", model.peft_config["default"])
    loss = model(input_ids=IDS, labels=IDS).loss
    MODES[case](model)
    with pytest.raises(RuntimeError, match=r"layer 1 .* changed between forward and backward"):
        loss.backward()


def test_modes_that_are_as_before_are_not() -> None:
    model: Any = lora(applied())
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter():
        model.eval()
    model.train()
    loss.backward()


def test_prefix_tuning_is_refused() -> None:
    model = get_peft_model(applied(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NotImplementedError, match="LoRA or full fine-tuning|pad on the right|Pad on the right"):
        model(input_ids=IDS, labels=IDS)


def test_a_layer_that_attends_in_another_way_is_refused() -> None:
    """Its tokens would be mixed within a chunk only."""
    model = tiny()
    model.model.layers[1].self_attn = Mixer(32)
    with pytest.raises(
        NotImplementedError, match=r"layer 1 .* never calls its attention function.*first in self_attn"
    ):
        apply_fpdt(model, PLUGIN)


class Mixer(nn.Module):
    """A running mean of the tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, dtype=torch.float64)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.linear(hidden_states).cumsum(1), None


@pytest.mark.parametrize(
    ("ranks", "gpu", "cpu"),
    [(1, 32_768, 4096), (3, 32_766, 4095), (4, 32_768, 4096), (8, 65_536, 4096), (32, 2**18, 4096)],
)
def test_a_chunk_of_its_own_choice_gives_every_gpu_enough(ranks: int, gpu: int, cpu: int) -> None:
    assert (auto_chunk_tokens(ranks, on_gpu=True), auto_chunk_tokens(ranks, on_gpu=False)) == (gpu, cpu)


def test_auto_takes_the_largest_chunk_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds what 2,048 tokens work with, and not what 4,096 do."""
    model, ids = tiny("llama", max_position_embeddings=8192), tokens(1, 5000)
    truth = train_step(model, ids)
    handle = apply_fpdt(model, FPDTPlugin(checkpoints="segment", loss_chunk_tokens=16))
    settings = handle._settings
    hidden = torch.empty(1, 5000, model.config.hidden_size, dtype=model.dtype)
    steps = [settings._step(hidden, size) for size in (2048, 4096)]
    working = [step.working_bytes(step.kv_bytes(NO_LIMIT)) for step in steps]
    device = int(DEVICE_RESERVE + DEVICE_MARGIN * sum(working) / 2)
    monkeypatch.setattr(hf_fpdt.memory.device_tiers, "available", lambda *_: Available(device, 2**34, 0))
    assert_same_step(train_step(model, ids), truth)
    assert settings.plan(hidden).chunk_tokens == 2048
    assert {step.plan.chunk_tokens for step, _ in handle.store.plans} == {2048}
    short = torch.empty(1, 3000, model.config.hidden_size, dtype=model.dtype)
    assert settings.plan(short).chunk_tokens == 4096, "settled for each length"
