"""Tiny transformers models made from a config, and how a training step of one is compared with that of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_fpdt import FPDTPlugin

VOCAB = 80
# A float64 model of transformers still has its norms, rotary embedding and loss in fp32. fp32 sums in another order
# differ by a few 1e-7 of the largest value.
TOLERANCE = 1e-6
# For models whose weights are fp32 throughout: rounding at every operation instead of at a few.
TOLERANCE_FP32 = 2e-5

CHUNK = 8
PLUGIN = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6)

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Mapping[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}  # where the architecture has such a setting


def tiny(
    name: str = "llama",
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    auto: Any = AutoModelForCausalLM,
    **config: Any,
) -> PreTrainedModel:
    """A model of architecture `name` in training mode; equal arguments give equal weights, whatever the attention."""
    default = AutoConfig.for_model(name)
    grouped = {key: value for key, value in GROUPED.items() if key in vars(default)}
    model = auto.from_config(
        AutoConfig.for_model(name, **{**SIZES, **grouped, **config}), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Wide enough for a softmax with a peak: flat attention averages errors away.
                parameter.normal_(std=0.3, generator=generator)
    return model.to(dtype).train()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [B, S] without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Step:
    """Loss and gradients of one training step; a parameter without gradient is absent."""

    loss: Tensor
    grads: Mapping[str, Tensor]


def train_step(model: nn.Module, ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Step:
    """One forward and backward pass; leaves the model without gradients."""
    loss = model(input_ids=ids, labels=ids if labels is None else labels, **kwargs).loss
    loss.backward()
    return taken_step(model, loss)


def taken_step(model: nn.Module, loss: Tensor) -> Step:
    """The gradients that lie in `model`, taken out of it."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return Step(loss.detach(), grads)


def assert_same_step(ours: Step, truth: Step, tolerance: float = TOLERANCE) -> None:
    """Fail unless loss and every gradient agree, each relative to its own largest value.

    Where the truth is almost zero (the bias of a key projection: softmax does not see it) rounding is all there is,
    so no gradient is measured against less than a thousandth of the largest one.
    """
    assert abs(ours.loss - truth.loss) <= tolerance * abs(truth.loss), f"loss {ours.loss:.9f}, not {truth.loss:.9f}"
    assert ours.grads.keys() == truth.grads.keys(), f"gradients of {ours.grads.keys() ^ truth.grads.keys()}"
    floor = 1e-3 * max(grad.abs().max().item() for grad in truth.grads.values())
    for name, grad in truth.grads.items():
        error = (ours.grads[name].double() - grad.double()).abs().max().item()
        size = max(grad.abs().max().item(), floor)
        # Written so that a NaN fails.
        assert error <= tolerance * size, f"gradient of {name}: relative error {error / size:.2e}"


def broken_steps(model: nn.Module, ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Step]:
    """Steps of a reference model with the mistakes a chunked trainer can make, for `assert_rejects`."""
    labels = ids if labels is None else labels
    length = ids.shape[1]
    assert length > 2 * CHUNK, "a lost chunk must lie left of the last one"
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    lost_chunk = causal.clone()
    lost_chunk[2 * CHUNK :, CHUNK : 2 * CHUNK] = False
    open_diagonal = causal.logical_or(torch.ones_like(causal).tril(1))
    masks = {"lost chunk": lost_chunk, "open diagonal": open_diagonal}
    broken = {
        name: train_step(model, ids, labels, attention_mask=mask.expand(len(ids), 1, -1, -1), **kwargs)
        for name, mask in masks.items()
    }
    with scaled_attention(model, 1.05):
        broken["wrong scale"] = train_step(model, ids, labels, **kwargs)
    return {**broken, "labels off by one": train_step(model, ids, labels.roll(1, 1), **kwargs)}


@contextmanager
def scaled_attention(model: nn.Module, factor: float) -> Iterator[None]:
    attentions: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), float)]
    assert attentions, "no module has the scale of attention"
    for module in attentions:
        module.scaling *= factor
    try:
        yield
    finally:
        for module in attentions:
            module.scaling /= factor
