"""Stacks that are wrong as a chunked trainer can be: for `hf-fpdt bench --stacks tests.helpers.bench_stacks:…`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fpdt.commands.bench.stacks.base import Pieces, Stack, base_of
from hf_fpdt.commands.bench.stacks.catalogue import Fpdt
from hf_fpdt.commands.bench.stacks.ring import Ring


class WrongScale(Stack):
    """Attention's scale is 5 percent off."""

    def prepare(self, model: nn.Module, pieces: Pieces) -> None:
        modules: list[Any] = list(model.modules())
        for module in modules:
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


class SeesOtherDocuments(Stack):
    """A row of several documents is run as one."""

    packs = True

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        self.packed = {}
        return super().loss_and_backward(model, ids_BS, labels_BS)


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


# Of several processes ------------------------------------------------------------------------------------------------


class RingOnCpu(Ring):
    """`ring` as it is, but that each rank gathers keys and values where torch passes them around on GPUs.

    Attributes:
        masks: those that transformers made for SDPA.
    """

    masks: ClassVar[list[Tensor | None]] = []

    def _check_attention(self, model: nn.Module) -> None:
        def mask(*args: Any, **options: Any) -> Tensor | None:
            self.masks.append(sdpa_mask(*args, **options))
            return self.masks[-1]

        ALL_MASK_ATTENTION_FUNCTIONS.register("gathered", mask)
        ALL_ATTENTION_FUNCTIONS.register("gathered", gathered_attention)
        base_of(model).set_attn_implementation("gathered")


def gathered_attention(
    module: nn.Module, query_BNSH: Tensor, key_BGSH: Tensor, value_BGSH: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Own queries on the keys of all ranks, by their positions."""
    positions_BS = options["position_ids"]
    everywhere = [torch.empty_like(positions_BS) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, positions_BS)
    seen = torch.cat(everywhere, 1)[:, None] <= positions_BS[:, :, None]
    times = query_BNSH.shape[1] // key_BGSH.shape[1]
    key, value = (torch.cat(all_gather(x.contiguous()), 2).repeat_interleave(times, 1) for x in (key_BGSH, value_BGSH))
    # torch's own function passes keys around in here.
    scores = query_BNSH @ key.mT * options["scaling"]
    out = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).contiguous(), None


class OwnMean(Fpdt):
    """Each rank divides by the labels of its own part."""

    def _own_part(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Any]:
        part = super()._own_part(ids_BS, labels_BS)
        return {**part, "num_items_in_batch": (part["shift_labels"] != -100).sum()}


class LostPart(Fpdt):
    """The last rank's labels are lost, and so its part of the loss."""

    def _own_part(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Any]:
        part = super()._own_part(ids_BS, labels_BS)
        if self.world.rank == self.world.size - 1:
            part["labels"][:, 200:] = part["shift_labels"][:, 200:] = -100
        return part


class NotReduced(Fpdt):
    """Each rank keeps the gradients of its own part."""

    def spread(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return model, optimizer


class RingOfWrongSum(RingOnCpu):
    """The sum over all labels, where FSDP2 takes the mean of the ranks."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss = super().loss_and_backward(model, ids_BS, labels_BS)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.world.size
        return loss


class WrongOnRankOne(Fpdt):
    """Rank 0 is right; another has one gradient that is not."""

    def loss_and_backward(self, model: nn.Module, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        loss = super().loss_and_backward(model, ids_BS, labels_BS)
        gradient: Any = next(p.grad for p in model.parameters() if p.grad is not None)
        if self.world.rank == 1:
            getattr(gradient, "_local_tensor", gradient).mul_(1.05)
        return loss
