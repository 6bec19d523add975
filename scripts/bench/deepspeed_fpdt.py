"""DeepSpeed's own FPDT attention as a stack of `hf-fpdt bench`, for Llama layers with every weight trained.

    PYTHONPATH=scripts/bench hf-fpdt bench FOLDER --full --stacks fpdt deepspeed_fpdt:DeepSpeedFpdt --chunk-tokens 64K

`deepspeed.sequence.fpdt_layer.FPDT_Attention` (deepspeed 0.19.8) takes a layer's projections, RoPE and attention, with
chunks of q, k, v and outputs in pinned host memory. It computes with flash-attn 2; where that is not installed, with
the FlashAttention-2 kernels that PyTorch ships, under the names that it imports. The rest of the layer is as it was:
measure it on a model of `attention_only.py`.
"""

import importlib
import importlib.machinery
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_fpdt.attention import AttentionSpec
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.commands.bench.stacks.base import Pieces, Stack, Unavailable, base_of
from hf_fpdt.model.layers import decoder_layers

CHUNK_TOKENS = 65_536  # what the paper recommends


class DeepSpeedFpdt(Stack):
    """FPDT_Attention in place of each layer's attention, offloading on."""

    name = "deepspeed-fpdt"
    about = "DeepSpeed's FPDT_Attention with offloading"

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        base = base_of(model)
        if base.config.model_type != "llama" or not all(p.requires_grad for p in model.parameters()):
            raise Unavailable("FPDT_Attention takes the weights of a Llama whose every weight trains; add --full.")
        stand_in_for_flash_attn(base.device.type)
        try:
            fpdt = importlib.import_module("deepspeed.sequence.fpdt_layer")
        except ImportError as error:
            raise Unavailable(f"{error}: pip install deepspeed==0.19.8 einops.") from error
        group = one_process_group(base.device.type)
        chunk = pieces.tokens(pieces.chunk_tokens or CHUNK_TOKENS)
        for layer in decoder_layers(base):
            attention: Any = layer.self_attn
            attention.forward = partial(attend, fpdt, group, chunk, attention)

    def warm_up_tokens(self, pieces: Pieces) -> int:
        return 2 * (pieces.chunk_tokens or CHUNK_TOKENS)


def attend(
    fpdt: Any, group: Any, chunk: int, attention: Any, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """What LlamaAttention.forward does, by FPDT_Attention."""
    config = attention.config
    sizes = SimpleNamespace(
        kv_channels=attention.head_dim,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_size=config.hidden_size,
        attention_dropout=0.0,
    )
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    output = attention.o_proj.weight
    # It adds biases whether there are any or not.
    biases = weight.new_zeros(len(weight)), weight.new_zeros(len(output))
    layer = fpdt.FPDT_Attention(
        sizes,
        weight,
        biases[0],
        output,
        biases[1],
        group,
        gather_idx=1,
        scatter_idx=2,
        chunk_size=divisor(hidden_states.shape[1], chunk),
    )
    # [1, S, H] to [S, 1, 1, H]
    rope = tuple(x.transpose(0, 1).unsqueeze(2) for x in kwargs["position_embeddings"])
    out_SBD, _ = layer(hidden_states.transpose(0, 1).contiguous(), None, None, rope, cpu_offloading=True)
    return out_SBD.transpose(0, 1), None


def divisor(n_tokens: int, most: int) -> int:
    """The largest chunk of at most so many tokens that cuts the length evenly, which FPDT_Attention asks for."""
    return next(size for size in range(min(most, n_tokens), 0, -1) if n_tokens % size == 0)


def one_process_group(device: str) -> Any:
    """A group of this process alone."""
    import deepspeed

    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    return torch.distributed.new_group([0])


def stand_in_for_flash_attn(device: str) -> None:
    """Make the two functions of flash-attn 2.8 that FPDT_Attention imports, where the package is missing."""
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
        return
    except ImportError:
        pass
    kernel = KERNELS["flash" if device == "cuda" else "cpu"]

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, causal: bool, **rest: Any) -> Any:
        out, lse = kernel.forward(q, k, v, causal=causal, spec=AttentionSpec.of(q, k, v, scale))
        return out, lse, None, None

    def backward(*args: Any, rng_state: Any = None) -> None:
        dout, q, k, v, out, lse, dq, dk, dv, _, scale, causal, *_ = args
        made = kernel.backward(dout, q, k, v, out, lse, causal=causal, spec=AttentionSpec.of(q, k, v, scale))
        for into, gradient in zip((dq, dk, dv), made, strict=True):
            into.copy_(gradient)

    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        module: Any = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__version__ = "2.8.3"
        module._flash_attn_forward, module._flash_attn_backward = forward, backward
        sys.modules[name] = module
