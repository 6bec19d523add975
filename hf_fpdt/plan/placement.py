"""What a step may hold where, and what it keeps: "auto" resolved, checked before anything is allocated.

Raises where a step cannot fit, with the arithmetic, instead of the kernel's out-of-memory killer an hour later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..config import FPDTPlugin
from ..layout import Block
from ..units import GIB
from .checkpointing import KeptChunks, KeptLayers, candidates, least_bytes, peak_bytes
from .kv_bytes import KVBytes
from .layer_bytes import LayerBytes
from .linears import saved_of, saved_operations, under_way_bytes, with_linears
from .rehearsal import Forecast, forecast, without_kv
from .sizes import StepSizes
from .tiers import STAGING_BUFFERS, Budgets, ExistingBuffers

NO_LIMIT = 2**62
# Left beside the arithmetic of the device's working set: fragments, libraries' workspaces.
DEVICE_MARGIN = 1.10
DEVICE_RESERVE = 1 * GIB
# Left of the host: what "auto" leaves to Python, CUDA, data loaders.
HOST_RESERVE = 6 * GIB


@dataclass(frozen=True)
class PassPlacement:
    """What a forward pass does with its memory, and the backward pass that follows it.

    Attributes:
        kv: K and V by chunk, and which chunks are resident.
        budgets: what checkpoints may take, without K and V.
        pinned: the most that all host buffers may be, those of K and V among them.
        forecast: what the step will take.
    """

    kv: KVBytes
    budgets: Budgets
    pinned: int
    forecast: Forecast

    @property
    def kept(self) -> KeptLayers:
        """Which layers keep what."""
        return self.forecast.kept


@dataclass(frozen=True)
class Available:
    """Bytes that the stores could fill on each tier when they were first asked; the least of all ranks that agree."""

    device: int
    host: int
    disk: int


def budgets_of(plugin: FPDTPlugin, step: StepSizes, there: Available) -> Budgets:
    """Bytes that the stores may fill on each tier in one step."""
    device, host = plugin.device_budget_gib, plugin.host_budget_gib
    working = DEVICE_RESERVE + DEVICE_MARGIN * step.working_bytes(step.kv_bytes(NO_LIMIT))
    spare = NO_LIMIT if there.device >= NO_LIMIT else max(0, int(there.device - working))
    return Budgets(
        device=spare if device == "auto" else int(device * GIB),
        host=there.host if host == "auto" else int(host * GIB),
        disk=there.disk,
    )


class NoRoom(MemoryError):
    """What a step keeps fits nowhere. The message, which takes longer than finding out, is made when it is read."""

    def __init__(self, message: Callable[[], str]) -> None:
        super().__init__()
        self._message = message

    def __str__(self) -> str:
        return self._message()


def has_room(plugin: FPDTPlugin, step: StepSizes, there: Available) -> bool:
    """Whether a step fits: its working set on the device, and what it keeps somewhere."""
    working = DEVICE_RESERVE + DEVICE_MARGIN * step.working_bytes(step.kv_bytes(NO_LIMIT))
    if working > there.device:
        return False
    try:
        plan_pass(plugin.checkpoints, step, step.model.layers, budgets_of(plugin, step, there))
    except MemoryError:
        return False
    return True


def plan_pass(
    policy: str, step: StepSizes, layers: int, budgets: Budgets, have: ExistingBuffers | None = None
) -> PassPlacement:
    """The fastest plan of the policy that the budgets hold.

    Args:
        policy: `FPDTPlugin.checkpoints`.
        layers: layers with a backward pass.
        have: the pinned buffers that stay; None: there are none.

    Raises:
        MemoryError: there is none; the message has the arithmetic and the ways out.
    """
    kv, sizes = step.kv_bytes(budgets.device, layers), step.layer_bytes(layers)
    # What a window reaches is on the device whatever its budget.
    device = max(0, budgets.device - kv.device_bytes)
    rest = Budgets(device, max(0, budgets.host - _staging_bytes(budgets, sizes)), budgets.disk)
    room = without_kv(rest, kv).total if rest.host >= kv.host_buffer_bytes else -1
    if room < least_bytes(policy, layers, sizes):
        raise NoRoom(partial(_too_much, policy, step, layers, budgets, kv))
    costs = step.attention_costs(layers)
    found: list[tuple[float, PassPlacement]] = []
    for most in _most_outputs(policy, step, layers, costs):
        plans = candidates(policy, sizes, room, costs, most)
        first = next(_that_fit(policy, plans, step, kv, rest, have), None)
        found += [] if first is None else [(_cost(first[0], step, costs), first[1])]
    if not found:
        raise NoRoom(partial(_too_much, policy, step, layers, budgets, kv))
    return min(found, key=lambda each: each[0])[1]


def _most_outputs(policy: str, step: StepSizes, layers: int, costs: Sequence[float]) -> Iterator[int]:
    """Attention outputs that may be kept: of all layers; of those alone where they save more a byte than linears."""
    sizes, attends = step.layer_bytes(layers), [mix.attends for mix in step.mixes_of_last(layers)]
    yield sum(attends)
    if policy != "auto" or not any(sizes.linears):
        return
    every = KeptChunks(len(step.plan.chunks))
    linears = {linear for kind in step.model.linears[-layers:] for linear in kind}
    tokens = step.batch * step.plan.n_tokens / step.plan.sp_size
    densest = max(saved_of(step, each, every) / (tokens * each.output_bytes(step.attention_bytes)) for each in linears)
    saved = [cost * _layer_operations(step) * tokens / sizes.attention_total for cost in costs]
    better = sum(attend and each >= densest for attend, each in zip(attends, saved, strict=True))
    if better < sum(attends):
        yield better


def _layer_operations(step: StepSizes) -> float:
    """Of a token, forward, in all linears of a layer: what `StepSizes.attention_costs` counts by."""
    return 2.0 * max(1, step.model.layer_parameters)


def _cost(kept: KeptLayers, step: StepSizes, costs: Sequence[float]) -> float:
    """What is run again, in forward passes of a layer's linears."""
    reruns = sum(cost for cost, there in zip(costs, kept.attentions, strict=True) if not there)
    tokens = step.batch * step.plan.n_tokens / step.plan.sp_size
    return reruns + kept.rebuilt - saved_operations(step, kept) / (tokens * _layer_operations(step))


def _that_fit(
    policy: str,
    plans: Iterable[KeptLayers],
    step: StepSizes,
    kv: KVBytes,
    rest: Budgets,
    have: ExistingBuffers | None,
) -> Iterator[tuple[KeptLayers, PassPlacement]]:
    """Those that the budgets hold, with what there is room for of what linears give; what all ranks would keep first.

    Ranks may differ in the buffers that they have: what is kept of linears may then differ too, and nothing else.
    """
    left = without_kv(rest, kv)
    for each in plans:
        sizes, agreed = step.layer_bytes(each.layers), None
        for kept in with_linears(policy, each, step, kv, left):
            away = under_way_bytes(kept, sizes)
            within = Budgets(max(0, rest.device - away), rest.host, rest.disk)
            # Without regard to the buffers there are: ranks must keep the same.
            found = forecast(kept, sizes, kv, within)
            agreed = kept if agreed is None and found is not None else agreed
            if found is not None and have:
                found = forecast(kept, sizes, kv, within, have)
            if found is not None and agreed is not None:
                yield agreed, PassPlacement(kv, without_kv(within, kv, have), rest.host, found)


def _staging_bytes(budgets: Budgets, sizes: LayerBytes) -> int:
    """Host memory through which bytes go to files and come back."""
    return STAGING_BUFFERS * sizes.longest if budgets.disk else 0


def _too_much(policy: str, step: StepSizes, layers: int, budgets: Budgets, kv: KVBytes) -> str:
    sizes = step.layer_bytes(layers)
    needed, staging = _least_that_fits(policy, layers, sizes, kv), _staging_bytes(budgets, sizes)
    on_host = f"; of it {_gib(kv.host_bytes + staging)} on the host, whatever files hold" if staging else ""
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(budgets).items() if size or name != "disk")
    return (
        f"hf_fpdt: FPDT cannot keep what the backward pass of {step.plan.n_tokens:,} tokens needs. Needed: "
        f"{_gib(needed)} for checkpoints={policy!r} ({layers} layers; one layer's input {_gib(sizes.input_total)}, "
        f"its attention output {_gib(sizes.attention_total)}) and {_gib(kv.device_bytes + kv.host_bytes)} for K, V "
        f"and their gradients{on_host}. There: {parts}, together {_gib(budgets.total)}. Nothing was allocated. Ways "
        f"out: {_smaller_policy(policy, layers, sizes)}larger budgets (device_budget_gib, host_budget_gib) or a "
        f"folder for files (disk_dir); fewer tokens, or more ranks a sequence (sp_size)."
    )


def _least_that_fits(policy: str, layers: int, sizes: LayerBytes, kv: KVBytes) -> int:
    """The least that checkpoints need on a host alone, with buffers that are longer than what lies in them."""
    least = least_bytes(policy, layers, sizes)
    if policy == "linears":
        return least  # long entries, nearly as long as their buffers
    for percent in range(100, 150):
        needed = least * percent // 100
        # To keep no attention output is what "auto" does at last.
        plans = candidates("segment" if policy == "auto" else policy, sizes, needed, (0.0,) * layers)
        if any(forecast(kept, sizes, kv, Budgets(0, needed + kv.host_buffer_bytes)) for kept in plans):
            return needed
    return least


def _smaller_policy(policy: str, layers: int, sizes: LayerBytes) -> str:
    least = least_bytes("segment", layers, sizes)
    return "" if policy in ("segment", "auto") else f'checkpoints="segment" ({_gib(least)}) or "auto"; '


def _gib(nbytes: int) -> str:
    if nbytes >= NO_LIMIT // 2:
        return "no limit"
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.2f} MiB"


def described(plan: PassPlacement, step: StepSizes, budgets: Budgets) -> str:
    """The one line that a person reads."""
    predicted, kept = plan.forecast, plan.kept
    places = f"device {_gib(predicted.device_bytes)}, host {_gib(predicted.host_bytes)}"
    files = f", files {_gib(predicted.disk_bytes)}" if predicted.disk_bytes else ""
    total = _gib(peak_bytes(kept, step.layer_bytes(kept.layers)))
    return (
        f"{_where_kv(plan.kv, plan.kv.backward_resident, step)}; keeps {kept}{_linears(plan.kept, step)} ({total}: "
        f"{places}{files}); in backward "
        f"{kept.attention_reruns} layers run attention again, {kept.rebuilt} run their linears once more; budgets "
        f"device {_gib(budgets.device)}, host {_gib(budgets.host)}"
    )


def _linears(kept: KeptLayers, step: StepSizes) -> str:
    share = linear_share(kept, step, range(kept.layers))
    return f" and {100 * share:.0f} % of what linears gave" if share else ""


def linear_share(kept: KeptLayers, step: StepSizes, layers: Iterable[int]) -> float:
    """Of what the linears of some layers of the pass would compute again, what is kept; 0 where none would."""
    every, saved, first = 0.0, 0.0, step.model.layers - kept.layers
    for layer in layers:
        for i, linear in enumerate(step.model.linears_of(first + layer)):
            every += saved_of(step, linear, KeptChunks(len(step.plan.chunks)))
            saved += saved_of(step, linear, kept.linears_of(layer)[i]) if kept.linears else 0.0
    return saved / every if every else 0.0


def described_kv(kv: KVBytes, step: StepSizes) -> str:
    """The same of a pass without a backward pass."""
    return _where_kv(kv, kv.forward_resident, step)


def _where_kv(kv: KVBytes, resident: int, step: StepSizes) -> str:
    windows = described_windows(step)
    parts = [] if kv.all_windowed else [f"K, V of {resident} chunks on the device"]
    return f"{step.plan.n_tokens:,} tokens in {len(step.plan.chunks)} chunks: {', '.join(parts + windows)}"


def described_windows(step: StepSizes) -> list[str]:
    """Of each window that the sequence reaches the layers that have it, the widest first, after those with a state."""
    counts = Counter(window for window in step.windows if window is not None)
    layers, carry = step.model.layers, sum(bool(mix.states) for mix in step.model.mixes)
    states = [f"{carry} of {layers} layers carry a state"] if carry else []
    return states + [
        f"{count} of {layers} layers see {'blocks of ' if isinstance(window, Block) else ''}{window:,} keys"
        for window, count in sorted(counts.items(), reverse=True)
    ]
