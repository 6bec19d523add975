"""Faster twins of a layer's own pieces, taken only where the layer's code is the code that they are twins of.

What a module is called says little about what it computes; that its forward compiles to the same bytecode as Llama's
says all. So every copy of Llama's norm, MLP or rotary embedding (Mistral, Qwen, SmolLM, …) is found, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.olmo3 import modeling_olmo3 as olmo3
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from ..engine import LayerTraits, current_call
from ..plan import LinearSize
from .experts.replace import are_experts, first_product, replace_experts
from .fused_linear import OutputUse, is_lora, may_be_kept, patch_linear
from .patch import is_patched, patch
from .settings import Settings

ROTARY = "apply_rotary_pos_emb"
# Attention whose q and k come straight from a projection or a norm, so that nobody needs their values before rotation,
# the module of its rotary embedding, and what that calls.
ATTENTIONS: tuple[tuple[Callable[..., Any], Any, str], ...] = (
    (llama.LlamaAttention.forward, llama, "rotate_half"),
    (mistral.MistralAttention.forward, mistral, "rotate_half"),
    (qwen2.Qwen2Attention.forward, qwen2, "rotate_half"),
    (qwen3.Qwen3Attention.forward, qwen3, "rotate_half"),
    (neox.GPTNeoXAttention.forward, neox, "rotate_half"),
    (gemma2.Gemma2Attention.forward, gemma2, "rotate_half"),
    (gemma3.Gemma3Attention.forward, gemma3, "rotate_half"),
    (olmo2.Olmo2Attention.forward, olmo2, "rotate_half"),
    (olmo3.Olmo3Attention.forward, olmo3, "rotate_half"),
    (gpt_oss.GptOssAttention.forward, gpt_oss, "_apply_rotary_emb"),
)
# Attention whose projection of q also gives a gate of what attention gives.
GATED_ATTENTIONS: tuple[Callable[..., Any], ...] = (
    qwen3_5.Qwen3_5Attention.forward,
    qwen3_next.Qwen3NextAttention.forward,
)
# Rotates as the others do, by cos and sin that are not written twice.
SINGLE = "_apply_rotary_emb"
# Layers that add what their MLP gives to what went in, and blocks of experts that only add to what those give. What
# else nobody reads is asked of the layer; but a block of experts cannot be run where weights have no memory.
RESIDUAL_LAYERS: tuple[Callable[..., Any], ...] = (
    kimi_linear.KimiLinearDecoderLayer.forward,
    llama.LlamaDecoderLayer.forward,
    qwen3_next.Qwen3NextDecoderLayer.forward,
    mixtral.MixtralDecoderLayer.forward,
    gpt_oss.GptOssDecoderLayer.forward,
)
EXPERT_BLOCKS: tuple[Callable[..., Any], ...] = (
    deepseek.DeepseekV3MoE.forward,
    gpt_oss.GptOssMLP.forward,
    mixtral.MixtralSparseMoeBlock.forward,
    olmoe.OlmoeSparseMoeBlock.forward,
    qwen2_moe.Qwen2MoeSparseMoeBlock.forward,
    qwen3_moe.Qwen3MoeSparseMoeBlock.forward,
)
PROJECTIONS = ("q_proj", "k_proj", "query_key_value")
REST = frozenset({"rest"})
BESIDE_KV, OTHERS = frozenset({"q", "rest"}), frozenset({"k", "v"})
BASE = ".base_layer"  # what PEFT calls what is inside of an adapter; of experts' there may be two


def fuse_layer(
    layer: nn.Module, forward: Callable[..., Any], settings: Settings, index: int, unread: frozenset[str]
) -> None:
    """Patch what can be replaced in a decoder layer whose own forward is `forward`, at the place `index`.

    It is called at every use of a layer: PEFT may have put adapters into it since the last, or around its linears.
    """
    fused = settings.plugin.fused
    entries = {linear.name: linear.entry for linear in settings.kept_linears(index)}
    if not fused and not entries:
        return
    values = {id(value.readers[0]): value for value in _known_values(layer, forward, unread)} if fused else {}
    for name, module in list(layer.named_modules()):
        if fused:
            replace_experts(module, settings)
        patch_linear(module, settings, index, values.get(id(module)), entries.get(name.replace(BASE, "")))
        if not fused:
            continue
        twin = None if settings.liger is None or is_patched(module) else _twin_of(module)
        if twin is not None:
            patch(module, twin, settings)


def linears_run_again(
    layer: nn.Module, forward: Callable[..., Any], traits: LayerTraits, *, fused: bool
) -> tuple[LinearSize, ...]:
    """Of the linears that a layer was seen to call, those that a backward pass computes again.

    Args:
        forward: the layer's own.
        traits: what the layer was seen to do.
        fused: whether products that nobody reads are left out.
    """
    modules = dict(layer.named_modules())
    names = {id(module): name for name, module in modules.items()}
    values = _known_values(layer, forward, traits.unread) if fused else ()
    uses: dict[str, frozenset[str]] = {names[id(value.readers[0])]: value.names for value in values}
    return tuple(
        linear._replace(captured=traits.attends and not linear.late and not uses.get(linear.name, OTHERS) <= BESIDE_KV)
        for linear in traits.linears
        if uses.get(linear.name) != REST and may_be_kept(modules[linear.name])
    )


def products_of_experts(layer: nn.Module, forward: Callable[..., Any], visited: int) -> Iterator[LinearSize]:
    """Of experts as one operation, whose block is known, the first product: it is as a linear's, which may be kept.

    Args:
        visited: experts of a token.
    """
    names = {id(module): name for name, module in layer.named_modules()}
    for value in _known_values(layer, forward):
        experts = value.readers[0]
        if are_experts(experts):
            inputs, outputs, itemsize = first_product(experts)
            yield LinearSize(
                names[id(experts)].replace(BASE, ""), inputs, visited * outputs, late=True, itemsize=itemsize
            )


def _inside_out(experts: nn.Module) -> tuple[nn.Module, ...]:
    """Experts, and what PEFT has put around them for adapters of their parameters, which hands their output on."""
    modules: list[Any] = [experts]
    while type(modules[0]).__name__ == "ParamWrapper":
        modules.insert(0, modules[0].base_layer)
    return tuple(modules)


def _known_values(
    layer: Any, forward: Callable[..., Any], unread: frozenset[str] = frozenset()
) -> Iterator[OutputUse]:
    """The modules of which it is known who reads their outputs; `unread` as in the layer's traits."""
    # A scale of the layer that trains has a gradient that is made of the MLP's value.
    known = list(_summed(getattr(layer, "mlp", None))) if _is_residual(forward) and not layer._parameters else []
    yield from known
    modules = dict(layer.named_modules())
    passed = [modules[name] for name in sorted(unread) if name in modules]
    for name in sorted(unread & modules.keys()):
        if all(modules[name] is not value.readers[0] for value in known):
            around = [modules[name[:at]] for at, letter in enumerate(name) if letter == "."]
            yield OutputUse(REST, (modules[name], *around, *passed))
    for name in ("self_attn", "attention"):
        attention = getattr(layer, name, None)
        if any(_runs(attention, known) for known, _, _ in ATTENTIONS):
            yield from _projections(attention)
        if any(_runs(attention, known) for known in GATED_ATTENTIONS):
            yield from _projections(attention, gated=True)


def _is_residual(forward: Callable[..., Any]) -> bool:
    return any(_same_code(forward, known) for known in RESIDUAL_LAYERS)


def _summed(mlp: Any) -> Iterator[OutputUse]:
    """The last pieces of an MLP or of a block of experts, of whose outputs there are sums alone."""
    if _runs(mlp, llama.LlamaMLP.forward):
        yield OutputUse(REST, (mlp.down_proj, mlp))
    if not any(_runs(mlp, known) for known in EXPERT_BLOCKS):
        return
    yield OutputUse(REST, (*_inside_out(mlp.experts), mlp))
    shared: Any = getattr(mlp, "shared_experts", None)
    if _runs(shared, llama.LlamaMLP.forward):
        yield OutputUse(REST, (shared.down_proj, shared, mlp))


def _projections(attention: Any, *, gated: bool = False) -> Iterator[OutputUse]:
    """q, k and v, read by attention alone, after a norm of theirs in some; with q a gate, where there is one."""
    norms = tuple(getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name))
    if hasattr(attention, "query_key_value"):
        yield OutputUse(frozenset({"q", "k", "v"}), (attention.query_key_value, attention))
        return
    for name in ("q", "k", "v"):
        names = BESIDE_KV if gated and name == "q" else frozenset({name})
        yield OutputUse(names, (getattr(attention, f"{name}_proj"), attention, *norms))


def _twin_of(module: Any) -> Callable[..., Any] | None:
    """The forward that computes what the module's own does, over Liger's kernels."""
    kind: Any = type(module)
    if _runs(module, llama.LlamaRMSNorm.forward):
        return _rms_norm_forward
    if _runs(module, gemma3.Gemma3RMSNorm.forward) and _same_code(kind._norm, gemma3.Gemma3RMSNorm._norm):
        return _rms_norm_from_zero_forward
    if _runs(module, gpt_oss.GptOssRMSNorm.forward):
        return _wide_rms_norm_forward
    if _runs(module, llama.LlamaMLP.forward):
        return GATED.get(type(module.act_fn))
    rotary = None if _replaced(module) else _rotary_of(kind)
    return None if rotary is None else _with_rotary(inspect.unwrap(kind.forward), rotary)


def _rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
        return self._fpdt.forward(hidden_states)
    return self._fpdt.settings.liger.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _rms_norm_from_zero_forward(self: Any, x: Tensor) -> Tensor:
    if not x.is_cuda or x.dtype != self.weight.dtype:
        return self._fpdt.forward(x)
    return self._fpdt.settings.liger.rms_norm_from_zero(x, self.weight, self.eps)


def _wide_rms_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    if not hidden_states.is_cuda or hidden_states.dtype != self.weight.dtype:
        return self._fpdt.forward(hidden_states)
    return self._fpdt.settings.liger.wide_rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _swiglu_forward(self: Any, x: Tensor) -> Tensor:
    if not (x.is_cuda and _is_sum(self.gate_proj) and _is_sum(self.up_proj)):
        return self._fpdt.forward(x)
    return self.down_proj(self._fpdt.settings.liger.silu_mul(self.gate_proj(x), self.up_proj(x)))


def _geglu_forward(self: Any, x: Tensor) -> Tensor:
    if not (x.is_cuda and _is_sum(self.gate_proj) and _is_sum(self.up_proj)):
        return self._fpdt.forward(x)
    return self.down_proj(self._fpdt.settings.liger.gelu_mul(self.gate_proj(x), self.up_proj(x)))


# By the activation of the gate.
GATED: Mapping[type, Callable[..., Any]] = MappingProxyType(
    {type(ACT2FN["silu"]): _swiglu_forward, type(ACT2FN["gelu_pytorch_tanh"]): _geglu_forward}
)


def _is_sum(module: nn.Module) -> bool:
    """Whether nothing needs the values of the module's output for its gradient, so that they may be overwritten."""
    return isinstance(module, nn.Linear) or is_lora(module)


class Rotary(NamedTuple):
    """A rotary embedding that is known.

    Attributes:
        function: q, k, cos and sin to q and k.
        once: whether cos and sin are written once for both halves of a head.
        narrows: whether it computes in the dtype of cos and sin, and gives that of q and k.
    """

    function: Callable[..., Any]
    once: bool
    narrows: bool

    def serves(self, q: Tensor, cos: Tensor) -> bool:
        """Whether the kernel gives what the function gives: it too gives the dtype of q."""
        return q.is_cuda and (q.dtype == cos.dtype or self.narrows)


def _with_rotary(forward: FunctionType, rotary: Rotary) -> Callable[..., Any]:
    """An attention's forward over a rotary embedding of ours; the module that defines it is left alone."""

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        liger = self._fpdt.settings.liger
        if not all(_is_sum(getattr(self, name)) for name in PROJECTIONS if hasattr(self, name)):
            return forward(self, *args, **kwargs)

        def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
            if others or not rotary.serves(q, cos):
                return rotary.function(q, k, cos, sin, **others)
            if _are_kept():
                q, k = q.clone(), k.clone()  # they are overwritten, and the backward pass will read them
            if rotary.once:
                cos, sin = (torch.cat((half, half), -1) for half in (cos, sin))
            return liger.rotary(q, k, cos, sin)

        names = {**forward.__globals__, ROTARY: fused}
        twin = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        twin.__kwdefaults__ = forward.__kwdefaults__
        return twin(self, *args, **kwargs)

    return patched


def _are_kept() -> bool:
    """Whether outputs of linears are those that the backward pass finds, so that nobody may write to them."""
    call = current_call()
    return call is not None and call.keeps_outputs()


@lru_cache
def _rotary_of(kind: Any) -> Rotary | None:
    """The rotary embedding of a class of attention, if both are known."""
    forward: Any = inspect.unwrap(kind.forward)  # transformers wraps forwards whose arguments have new names
    for attention, module, helper in ATTENTIONS:
        if isinstance(forward, FunctionType) and _same_code(forward, attention):
            rotary, known = forward.__globals__.get(ROTARY), getattr(module, ROTARY)
            if rotary is None or not _same_code(rotary, known):
                return None
            called = getattr(inspect.unwrap(rotary), "__globals__", {}).get(helper)
            narrows = _same_code(rotary, olmo2.apply_rotary_pos_emb)
            return Rotary(rotary, helper == SINGLE, narrows) if _same_code(called, getattr(module, helper)) else None
    return None


def _runs(module: Any, forward: Callable[..., Any]) -> bool:
    """Whether calling `module` runs the code of `forward`, and nothing around it."""
    return module is not None and not _replaced(module) and _same_code(type(module).forward, forward)


def _replaced(module: Any) -> bool:
    """Whether the instance has a forward of its own, other than ours."""
    own = module._fpdt.instance_forward if is_patched(module) else vars(module).get("forward")
    return own is not None


@lru_cache
def _same_code(one: Callable[..., Any] | None, other: Callable[..., Any]) -> bool:
    return _code(one) is not None and _code(one) == _code(other)


def _code(function: Any) -> tuple[Any, ...] | None:
    """What a function does, by its bytecode and what that refers to; docstrings and names of files aside."""
    inner: Any = function if function is None else inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    if not isinstance(code, CodeType):
        return None
    constants = tuple(constant for constant in code.co_consts if constant != inner.__doc__)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants
