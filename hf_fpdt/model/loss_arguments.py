"""What a call asks of the loss, and the loss in chunks does not hear, is refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

# Of the loss's parameters those that are heard here, and those that the model's forward fills.
_HEARD = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")
_FILLED = ("logits", "vocab_size", "source", "input", "target", "kwargs")


@functools.cache
def _unheard_parameters() -> Mapping[str, Any]:
    """Defaults of what a cross-entropy may be asked for, by name, and ours is not."""
    losses = (functional.cross_entropy, fixed_cross_entropy, ForCausalLMLoss)
    parameters = [p for loss in losses for p in inspect.signature(loss).parameters.values()]
    return MappingProxyType({p.name: p.default for p in parameters if p.name not in (*_HEARD, *_FILLED)})


def check_loss_arguments(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for what only a loss function would hear of a call, and the one in chunks does not.

    A model's forward hands on to its loss function what it does not know itself.
    """
    unheard = [
        name
        for name, default in _unheard_parameters().items()
        if (value := arguments.get(name, default)) is not default and (isinstance(value, Tensor) or value != default)
    ]
    if unheard:
        raise NotImplementedError(
            f"hf_fpdt: the loss in chunks does not take {', '.join(unheard)}, only {', '.join(_HEARD)}: leave it out "
            "(transformers' own loss may ignore it in silence), or call the model without labels and compute the loss "
            "from its logits, which are whole then (tokens x vocabulary)."
        )
