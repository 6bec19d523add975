"""How a transformers model is put on the engine, and taken off again.

In reading order:

    apply               `apply_fpdt`, and the handle that undoes it
    trial               what its layers are seen to do before the first step
    layers              a decoder layer as the engine runs it
    head                base model, norm, head and loss
    attention_function  what is registered as "fpdt"
    refusals            which models are not served, and what a call may not ask of the loss
    settings            what the patched modules share
    adapters            the rotary parameters that an adapter was trained with
    patch               an instance's forward replaced, and put back
    fused               which pieces of a layer have a faster twin
    fused_linear        LoRA fused; products that nobody reads, or whose values were kept
    experts/            chosen experts as one operation: which (replace), how (operation), its passes, its gates
    weights/            linears of bitsandbytes (quantised), quantised as transformers does (packing), frozen weights
                        on the host (host), a layer's weights whole while it runs (whole)
    scoring/            log-probabilities: TRL's call and ours (log_probs), the head on some tokens (head_call), rows
                        that are padded on the left (left_padding), or cut over ranks (whole_rows); the router's
                        loss of experts (router)
    liger               Liger's kernels, where they are
    shapes              known models as configurations; sizes of a model for the planner
"""

from .adapters import mapping_with_rope, rope_of, trained_rope, without_adapters
from .apply import (
    FPDTHandle,
    applied_settings,
    apply_fpdt,
    device_peak,
    has_fpdt,
    may_get_fpdt,
    train_with,
    waiting_names,
    why_refused,
)
from .attention_function import register
from .head import joins_rows
from .layers import decoder_layers, mostly_trained
from .scoring.left_padding import why_not_moved
from .scoring.log_probs import TokenLogProbs, asks_for_log_probs, chunked_log_probs
from .shapes import LORA_RANK, SHAPES, build_random, training_of, training_of_model, with_layers, with_lora
from .weights.packing import (
    QUANTISED_KINDS,
    bitsandbytes_config,
    check_quantised_here,
    dequantise,
    expert_weights,
    quantise,
    quantised_bytes,
    scale_bytes,
    weight_count,
)

__all__ = [
    "FPDTHandle",
    "LORA_RANK",
    "QUANTISED_KINDS",
    "SHAPES",
    "TokenLogProbs",
    "applied_settings",
    "apply_fpdt",
    "asks_for_log_probs",
    "bitsandbytes_config",
    "build_random",
    "check_quantised_here",
    "chunked_log_probs",
    "decoder_layers",
    "joins_rows",
    "dequantise",
    "device_peak",
    "expert_weights",
    "has_fpdt",
    "mapping_with_rope",
    "may_get_fpdt",
    "mostly_trained",
    "quantise",
    "quantised_bytes",
    "register",
    "rope_of",
    "scale_bytes",
    "train_with",
    "trained_rope",
    "training_of",
    "training_of_model",
    "waiting_names",
    "weight_count",
    "why_not_moved",
    "why_refused",
    "with_layers",
    "with_lora",
    "without_adapters",
]
