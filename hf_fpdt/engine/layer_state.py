"""How a layer is built and what it holds: what says whether it still is the layer that was tried."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SMALL_BUFFER = 2**20  # elements


def look_of(layer: nn.Module) -> tuple[object, ...]:
    """What of a layer may change from step to step and change what it computes: modules, modes, hooks."""
    found: list[object] = []
    for module in layer.modules():
        own = vars(module)
        patch = own.get("_fpdt")
        forward = own.get("forward") if patch is None else patch.instance_forward
        found += (type(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
        found.append(None if forward is None else id(forward))
        if "_active_adapter" in own:
            found += (str(own["_active_adapter"]), own.get("_disable_adapters"))
    return tuple(found)


def build_of(layer: nn.Module) -> tuple[object, ...]:
    """What layers have in common that compute alike, whatever their weights; hooks of a user make each its own."""
    found: list[object] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not key.startswith("_fpdt") and not _is_place(key)
        }
        found += [name, type(module), *plain.items(), str(vars(module).get("_active_adapter"))]
        weights = ((key, weight) for key, weight in module._parameters.items() if weight is not None)
        found += [(key, tuple(weight.shape), weight.dtype, weight.requires_grad) for key, weight in weights]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            found += [key for key, hook in hooks.items() if not is_fsdps(hook)]
    return tuple(found)


def _is_place(name: str) -> bool:
    """Whether an attribute says where in the model a layer stands."""
    return name.endswith(("idx", "index", "layer_id", "layer_number"))


def is_fsdps(hook: Any) -> bool:
    """Whether a module's hook is FSDP2's, not a user's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


class Buffers:
    """A layer's buffers as they are now."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.found = [
            (module, key, buffer, None if buffer.is_inference() else buffer._version, _small_copy(buffer))
            for module in layer.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def changed(self) -> str | None:
        """Why they are not what they were."""
        for module, key, buffer, version, _ in self.found:
            now = module._buffers.get(key)
            if now is not buffer or (version is not None and now._version != version):
                return (
                    f"its buffer {key} ({type(module).__name__}) changes with each forward pass, of which chunks make "
                    "several, and their replays more"
                )
        return None

    def restore(self) -> None:
        """Put back what was written."""
        for module, key, buffer, version, copy in self.found:
            if copy is not None and version is not None and buffer._version != version:
                buffer.detach().copy_(copy)
            module._buffers[key] = buffer


def _small_copy(buffer: Tensor) -> Tensor | None:
    return buffer.detach().clone() if buffer.numel() <= SMALL_BUFFER else None
