"""Stacks that are wrong in the ways a chunked trainer can be, for `hf-fpdt bench --stacks tests.bench_stacks:…`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_fpdt.bench.stack import Pieces, Stack


class WrongScale(Stack):
    """Attention's scale is 5 percent off."""

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), float):
                module.scaling *= 1.05


class ShiftedLabels(Stack):
    """Every label is that of the token before."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        return super().loss_and_backward(model, ids_BS, labels_BS.roll(1, 1))


class LostChunk(Stack):
    """Late queries do not see one early chunk of keys."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        length = ids_BS.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[512:, 256:384] = False
        loss = model(input_ids=ids_BS, labels=labels_BS, attention_mask=seen[None, None]).loss
        loss.backward()
        return loss.detach()


class MeanOverAll(Stack):
    """The loss is divided by all tokens, the ignored ones too."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        output = model(input_ids=ids_BS, labels=labels_BS, num_items_in_batch=labels_BS.numel())
        output.loss.backward()
        return output.loss.detach()


class NoGradients(Stack):
    """A quick step: half of the gradients are missing."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss = super().loss_and_backward(model, ids_BS, labels_BS)
        for parameter in list(model.parameters())[::2]:
            parameter.grad = None
        return loss
