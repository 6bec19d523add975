"""How a transformers model is put on the engine, and taken off again.

In reading order:

    apply              `apply_fpdt(model, plugin)`: the layer executor, the chunked loss and the chunked final
    layers             A decoder layer as the executor runs it: the class that is put in place of its own, and
    head               the model outside of its layers: final norm, head and loss, on the model's own code, in
    attention_function what transformers calls: the attention function and the mask function registered under
    refusals           which models FPDT serves, decided from the model alone before any step. Every reason is
    loss_arguments     what a call asks of the loss, and the loss in chunks does not hear, is refused by name
    settings           what the patched modules of one model share
    patch              replacing the `forward` of one module instance, and taking the replacement away again
    fused              faster twins of a layer's own pieces, taken only where the layer's code is the code that
    fused_linear       linear layers of a decoder layer: LoRA without passes over memory of its own, and products
    liger              liger's Triton kernels, where the package `liger-kernel` is installed: norm, SwiGLU and
    shapes             sizes of known models as configurations, and models with random weights made from one: for
    sizes              sizes of a model for the planner, from its configuration: built without memory
"""

from .apply import FPDTHandle, applied_settings, apply_fpdt, device_peak, has_fpdt, train_with, why_refused
from .attention_function import register
from .layers import decoder_layers, mostly_trained
from .shapes import LORA_RANK, SHAPES, build_random, with_layers
from .sizes import training_of, training_of_model

__all__ = [
    "FPDTHandle",
    "LORA_RANK",
    "SHAPES",
    "applied_settings",
    "apply_fpdt",
    "build_random",
    "decoder_layers",
    "device_peak",
    "has_fpdt",
    "mostly_trained",
    "register",
    "train_with",
    "training_of",
    "training_of_model",
    "why_refused",
    "with_layers",
]
