"""Tiny models, and the same computation done naively: the truth the layer executor is held against.

transformers computes parts of a float64 model in fp32: RMSNorm, the softmax of eager attention, the loss. `in_double`
takes these casts out of a model, so that a comparison can go down to float64's own rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_fpdt.labels import IGNORE_INDEX

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 4096}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A float64 model in training mode: "llama" (4 query, 2 key/value heads), "neox" or "neox-sequential"."""
    torch.manual_seed(7)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**({"num_key_value_heads": 2} | SIZES | changes)))
    else:
        parallel = family == "neox"
        model = GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=parallel, **(SIZES | changes)))
    with torch.no_grad():  # initial weights give flat attention, which hides errors; these give peaks
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "query_key_value.weight" in name:
                parameter.mul_(12)
    return model.double().train()


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose norms compute in the model's own dtype."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def loss_and_gradients(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss the model itself returns and every gradient, by name."""
    model.zero_grad()
    return _collect(model, model(input_ids=ids, labels=labels).loss)


def truth(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and gradients with SDPA (float64 throughout) and a loss without transformers' fp32 cast."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    return _collect(model, _causal_lm_loss(model(input_ids=ids).logits, labels))


def _causal_lm_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Next-token cross-entropy of whole logits as transformers' `ForCausalLMLoss` has it, without its fp32 cast."""
    log_p, targets = logits_BSV[:, :-1].log_softmax(-1), labels_BS[:, 1:]
    kept = targets != IGNORE_INDEX
    picked = log_p.gather(-1, targets.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    return -(picked * kept).sum() / kept.sum()


def _collect(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    missing = [name for name, p in named.items() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
