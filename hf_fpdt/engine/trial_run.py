"""One decoder layer on a few random tokens: what it does, and whether that is the same in chunks.

Attention stands aside, each token attending to itself. Then of a layer without states

    gradients   of some tokens' outputs in all other tokens' inputs must be zero, to the bit
    values      of some tokens must stay what they are when all other tokens change
    places      must not count: tokens that are shifted give the same outputs, shifted

and of every layer

    chunks      must give the outputs and gradients of the whole, within rounding; a recurrent layer's go on from the
                states that it puts in its cache, so those must be all that it needs of the tokens before
    buffers     must stay as they are: a chunk may not leave anything to the next one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Chunk, ChunkPlan
from ..parallel import SequenceParallelGroup
from .calls import TrialCall, calling, current_call
from .gradients import GradientSums, mean_size, norm_of
from .layer_run import along_tokens, tokens_of
from .layer_state import Buffers, LayerTraits, LinearsSeen
from .recurrent import StandInCache, hidden_states_of, scans_over, scans_seen
from .replay_state import RandomState
from .unread import ValuesSeen, unread_values

# Two chunks, of 32 and of 16: multiples of 16, which products in 8 bits insist on.
TRIAL_TOKENS, TRIAL_CHUNK_TOKENS = 48, 32
# Two chunks of more than one token, which layers with a state compute in another way.
LEAST_TRIAL_TOKENS = 6
# Draws until no token was routed to other experts by rounding alone, and no weight's gradient cancelled.
DRAWS = 5
# Rounding, in units of the last place: errors are Euclidean norms over a token or a tensor, which average it. A
# product of as many rows gives a row nearly the same bits wherever it stands; one of other rows rounds throughout.
UNITS, SAME_SHAPE_UNITS = 4.0, 0.25
SHIFT = 7
PLACES_COUNT = "in chunks it computes something else than as a whole: a token's place or their number counts"
STATES_LACK = (
    "in chunks it computes something else than as a whole: what it puts in its cache is not all that it needs of the "
    "tokens before, or it does not go on from it (Mamba-1)"
)
NEITHER = "though it never calls its attention function and leaves no state in a cache"
DRAWS_BESIDE = "it draws random numbers beside dropout, so whether its states are all that it needs cannot be seen"
REENTRANT = (
    "a checkpoint inside of it is reentrant, which PyTorch runs in a backward pass of all weights alone; checkpoint "
    "with use_reentrant=False, or not at all, since chunks are recomputed already"
)
# Of a decay, one number a head, the parts of its gradient cancel: in bfloat16 two ways to cut 4,096 tokens
# differed by 0.1 of it. Wrong ones differ by 1, and outputs and gradients of inputs are looked at too.
NARROW, NARROW_SUMS = 1e-3, 0.25
# A weight's gradient is asked for no more than this share of the largest, by root mean square.
SMALL = 1e-2
# Models of wider weights have parts in fp32, and long sums.
FP32_UNIT = 2.5e-5
INPUT_SIZE, ADAPTER_SIZE = 0.3, 0.02


# Outputs, gradients of inputs, and of weights by their ids.
Outcome = tuple[Tensor, Tensor, Mapping[int, Tensor]]


class LayerTrial:
    """One layer on `tokens` random tokens.

    Args:
        layer: a decoder layer, its weights whole.
        forward: its own forward, hidden states first.
        kwargs: its other arguments for so many tokens.
        like_BSD: hidden states of the kind that it is given.

    Attributes:
        window: the keys that a query sees, by the mask that the model makes for the layer.
        keys: of the whole sequence.
        marked: whether scans are given marks of documents, where a cache knows of such.
        traits: what the layer was seen to do.
    """

    def __init__(
        self, layer: nn.Module, forward: Callable[..., Any], kwargs: Mapping[str, Any], like_BSD: Tensor, tokens: int
    ) -> None:
        self.layer, self.forward, self.kwargs = layer, forward, kwargs
        self.plan = ChunkPlan(tokens, min(TRIAL_CHUNK_TOKENS, -(-tokens * 2 // 3)) if tokens <= TRIAL_TOKENS else 256)
        self.dtype, self.device, self.width = like_BSD.dtype, like_BSD.device, like_BSD.shape[-1]
        self.weights = [p for p in layer.parameters() if p.requires_grad]
        self.start = RandomState.now(self.device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.draws = False
        self.window: int | None = None
        self.traits, self._known, self._asks, self.marked = LayerTraits(), False, False, False
        self.keys = 2**62
        self.tolerance = UNITS * unit_of(layer.parameters(), like_BSD)

    def why_not(self, cache: str | None) -> str | None:
        """The first reason why it cannot be run in chunks; `traits` are known then.

        Args:
            cache: what the layer calls its cache.
        """
        before = Buffers(self.layer)
        try:
            self.traits = self._seen(cache)
            self.draws = self._draws()
            reason = self._why_not_alone() if not self.traits.is_recurrent else DRAWS_BESIDE if self.draws else None
            if reason is None and not self.draws:
                reason = self.why_never(self._why_not_in_chunks)
            if reason is None:
                self.traits = replace(self.traits, unread=self._unread())
            # What was seen of outputs may come from a buffer, and says less.
            return before.changed() or reason
        except NotImplementedError as error:  # of the attention function, or of what stands in for it
            return str(error).removeprefix("hf_fpdt: ").rstrip(".")
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            return REENTRANT
        finally:
            before.restore()

    def _seen(self, cache: str | None) -> LayerTraits:
        """What the layer does with all tokens and a cache; with none where it wants more of a cache than ours."""
        stand_in, call, heads = StandInCache(0), TrialCall(self.window, self.keys), set[int]()
        self.start.restore()
        x = self.draw()
        linears = LinearsSeen(self.layer, x, lambda: call.calls > 0)
        try:
            with torch.no_grad(), calling(call), scans_seen(self.layer, heads), linears.watched():
                output = self.forward(x, **{**self.kwargs, **({} if cache is None else {cache: stand_in})})
        except (AttributeError, TypeError):
            if cache is None:
                raise
            return self._seen(None)
        hidden_states_of(output)
        if call.calls > 1:
            raise NotImplementedError("it calls its attention function twice; FPDT drives one call in each layer")
        self._known, self._asks = True, stand_in.asked
        seen = LayerTraits.of(stand_in, cache, output, attends=call.calls == 1, asked=call.asked)
        return replace(seen, scan_heads=tuple(sorted(heads)), linears=linears.found())

    def _unread(self) -> frozenset[str]:
        """Modules whose values no gradient and no state is made of."""
        x, dy = self.draw(), self.draw()
        values = ValuesSeen(self.layer, x, lambda: getattr(current_call(), "calls", 0) > 0)
        with values.saved():
            self.run(x.clone().requires_grad_())

        def outcome() -> list[Tensor]:
            cache = None if self.traits.cache is None else StandInCache(0)
            sums = GradientSums(self.weights)
            _, dx, _ = self.step(x, dy, sums, cache=cache)
            states = {} if cache is None else cache.finals
            return [dx, *sums.totals().values(), *(state.detach() for state in states.values())]

        names = values.never_saved(attends=self.traits.attends)
        return unread_values(self.layer, names, outcome, 2 * self.tolerance)

    # -- one run ------------------------------------------------------------------------------------------------------

    def draw(self) -> Tensor:
        """Random hidden states or gradients [1, tokens, D]."""
        noise = torch.randn(
            1, self.plan.n_tokens, self.width, generator=self.generator, device=self.device, dtype=torch.float32
        )
        return noise.mul_(INPUT_SIZE).to(self.dtype)

    def run(
        self,
        x_BSD: Tensor,
        chunk: Chunk | None = None,
        kwargs: Mapping[str, Any] | None = None,
        cache: StandInCache | None = None,
    ) -> Tensor:
        """Its outputs; every run finds the same random state. The whole has a cache if the layer asks for one."""
        kwargs = self.kwargs if kwargs is None else kwargs
        if chunk is not None:
            kwargs = {name: tokens_of(value, chunk, self.plan) for name, value in kwargs.items()}
        if cache is None and self._asks:
            cache = StandInCache(0 if chunk is None else chunk.start)
        if cache is not None and self.traits.cache is not None:
            kwargs = {**kwargs, self.traits.cache: cache}
        self.start.restore()
        part = None if cache is None else cache.part
        scans = scans_over(self.layer, SequenceParallelGroup(), part, marked=self.marked)
        with calling(call := TrialCall(self.window, self.keys)), scans:
            y_BSD = hidden_states_of(self.forward(x_BSD, **kwargs))
        if self._known and (call.calls == 1) != self.traits.attends:
            raise NotImplementedError("it calls its attention function in some runs, and not in others")
        return y_BSD

    def _draws(self) -> bool:
        """Whether the layer draws random numbers beside dropout: other ones for a chunk than for the whole."""
        with torch.no_grad():
            self.run(self.draw())
        return not self.start.is_now()

    # -- each token alone ---------------------------------------------------------------------------------------------

    def _why_not_alone(self) -> str | None:
        """Half of the tokens change: the others' outputs may not, nor may either half have gradients in the other."""
        order = torch.randperm(self.plan.n_tokens, generator=self.generator, device=self.device)
        half = order < len(order) // 2
        x, other, dy = self.draw(), self.draw(), self.draw()
        y, _ = self._gradient_across(x, dy, half)
        if not bool(y.isfinite().all()):
            return None  # weights that are not there yet say nothing
        for kept in (half, ~half):
            changed = torch.where(kept[:, None], x, other)
            y_changed, crossing = self._gradient_across(changed, dy, kept)
            if crossing or self._differ(token_errors(y_changed, y)[kept]):
                others = "beside those that attention reads" if self.traits.attends else NEITHER
                return (
                    f"what it computes for one token depends on other tokens {others}{self._where(x, changed, kept)}"
                )
        if self.draws or self._asks:
            return None  # by place
        with torch.no_grad():
            shifted = along_tokens(self.kwargs, self.plan.n_tokens, lambda value, axis: value.roll(SHIFT, axis))
            y_shifted = self.run(x.roll(SHIFT, 1), kwargs=shifted).roll(-SHIFT, 1)
        return PLACES_COUNT if self._differ(token_errors(y_shifted, y)) else None

    def _differ(self, errors: Tensor) -> bool:
        """Whether tokens of two runs on as many tokens each differ by more than rounding."""
        # Products in 8 bits choose the columns that they do not narrow by all tokens; that is rounding of theirs.
        quantised = any(not weight.is_floating_point() for weight in self.layer.parameters())
        same = self.tolerance if quantised else self.tolerance * SAME_SHAPE_UNITS / UNITS
        return bool((errors > self.tolerance).any() | ((errors > same).float().mean() > 0.25))

    def _gradient_across(self, x: Tensor, dy: Tensor, rows: Tensor) -> tuple[Tensor, bool]:
        """Outputs, and whether those of `rows` have a gradient in the input of other tokens."""
        x = x.clone().requires_grad_()
        y = self.run(x)
        if not y.requires_grad:
            return y.detach(), False
        (dx,) = torch.autograd.grad([y], [x], [torch.where(rows[:, None], dy.to(y.dtype), 0)], allow_unused=True)
        return y.detach(), dx is not None and bool((dx[:, ~rows] != 0).any())

    def _where(self, x: Tensor, changed: Tensor, rows: Tensor) -> str:
        """The first module whose outputs for `rows` differ, though its tokens do not."""
        outputs: list[list[tuple[nn.Module, Tensor]]] = []
        for hidden in (x, changed):
            outputs.append([])
            handles = [m.register_forward_hook(_recorder(outputs[-1], rows)) for m in self.layer.modules()]
            try:
                with torch.no_grad():
                    self.run(hidden)
            finally:
                for handle in handles:
                    handle.remove()
        names = {module: name for name, module in self.layer.named_modules()}
        for (module, one), (_, other) in zip(*outputs, strict=False):
            same = one.shape == other.shape and bool((one - other).norm() <= self.tolerance * one.norm())
            if not same and names.get(module):
                return f", first in {names[module]} ({type(module).__name__})"
        return ""

    # -- in chunks ----------------------------------------------------------------------------------------------------

    def why_never(self, attempt: Callable[[], tuple[str | None, Tensor]]) -> str | None:
        """A reason that holds in every draw: an attempt gives one, and which tokens come out otherwise.

        Rounding alone may send a token to other experts, or be what is left of a weight's gradient that cancels.
        """
        always: Tensor | None = None
        of_sums: str | None = None
        for _ in range(DRAWS):
            reason, off = attempt()
            if not bool(off.any()):
                if reason is None:
                    return None
                of_sums = reason
            elif reason is not None:
                return reason
            else:
                always = off if always is None else always & off
        if of_sums is not None:
            return of_sums
        return STATES_LACK if self.traits.is_recurrent and always is not None and bool(always.any()) else None

    def _why_not_in_chunks(self) -> tuple[str | None, Tensor]:
        """A reason, and which tokens come out otherwise in chunks."""
        x, dy, sums = self.draw(), self.draw(), GradientSums(self.weights)
        y, dx, _ = self.step(x, dy, sums)
        return self.beside((y, dx, sums.totals()), self.in_chunks(x, dy, StandInCache))

    def beside(self, truth: Outcome, found: Outcome) -> tuple[str | None, Tensor]:
        """A reason why one of them is not the other, and which tokens differ."""
        (y_true, dx_true, sums), (y, dx, totals) = truth, found
        off = (token_errors(y, y_true) > self.tolerance) | (token_errors(dx, dx_true) > 2 * self.tolerance)
        if not bool(off.any()):
            return self._why_not_sums(sums, totals), off
        if any(bool(off[chunk.rank_slice].float().mean() > 0.5) for chunk in self.plan.chunks):
            return STATES_LACK if self.traits.is_recurrent else PLACES_COUNT, off
        return None, off

    def in_chunks(self, x: Tensor, dy: Tensor, cache_of: Callable[..., StandInCache]) -> Outcome:
        """What chunks give that go on from one another's states; `cache_of` is given a chunk's start, and states."""
        parts, sums = list[tuple[Tensor, Tensor]](), GradientSums(self.weights)
        before, d_states = self._states_before(x, cache_of), dict[str, Tensor]()
        for chunk in reversed(self.plan.chunks):
            tokens, cache = chunk.rank_slice, cache_of(chunk.start, before[chunk.index], leaves=True)
            y, dx, d_states = self.step(x[:, tokens], dy[:, tokens], sums, chunk, cache, d_states)
            parts.insert(0, (y, dx))
        y, dx = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return y, dx, sums.totals()

    def _states_before(self, x: Tensor, cache_of: Callable[..., StandInCache]) -> list[dict[str, Tensor]]:
        """Of each chunk the states that it begins with."""
        states: list[dict[str, Tensor]] = [{}]
        for chunk in self.plan.chunks[:-1] if self.traits.is_recurrent else ():
            cache = cache_of(chunk.start, states[-1])
            with torch.no_grad():
                self.run(x[:, chunk.rank_slice], chunk, cache=cache)
            states.append(cache.finals)
        return states if self.traits.is_recurrent else states * len(self.plan.chunks)

    def step(
        self,
        x: Tensor,
        dy: Tensor,
        sums: GradientSums,
        chunk: Chunk | None = None,
        cache: StandInCache | None = None,
        d_finals: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Outputs, gradients of inputs and of the states before; those of weights are added up."""
        x = x.clone().requires_grad_()
        y = self.run(x, chunk, cache=cache)
        given, finals = ({}, {}) if cache is None else (cache.given, cache.finals)
        pairs = [(y, dy.to(y.dtype)), *((finals[name], grad) for name, grad in d_finals.items())]
        pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
        inputs = [x, *given.values()]
        outputs, grads = [output for output, _ in pairs], [grad for _, grad in pairs]
        dx, *d_given = sums.differentiate(outputs, grads, inputs) if pairs else [None] * len(inputs)
        d_states = {name: grad for name, grad in zip(given, d_given, strict=True) if grad is not None}
        return y.detach(), torch.zeros_like(x) if dx is None else dx, d_states

    def _why_not_sums(self, wholes: Mapping[int, Tensor], totals: Mapping[int, Tensor]) -> str | None:
        """Weights' gradients of the whole beside those of its chunks, added up."""
        names = {id(p): name for name, p in self.layer.named_parameters()}
        narrow = self.traits.is_recurrent and self.tolerance > NARROW
        tolerance = max(2 * self.tolerance, NARROW_SUMS) if narrow else 2 * self.tolerance
        largest = max((mean_size(grad) for grad in wholes.values()), default=0.0)
        for key, grad in wholes.items():
            error = norm_of(totals[key] - grad) if key in totals else float("inf")
            size = max(mean_size(grad), SMALL * largest) * grad.numel() ** 0.5
            if not error <= tolerance * size:
                return f"the gradient of {names[key]} is no sum over tokens"
        return None

    @contextmanager
    def awake_adapters(self) -> Iterator[None]:
        """Weights that begin at zero hide what is before them: inside, they are small numbers."""
        asleep = [p for p in self.weights if p.is_floating_point() and not bool(p.any())]
        for weight in asleep:
            weight.data.normal_(std=ADAPTER_SIZE, generator=self.generator)
        try:
            yield
        finally:
            for weight in asleep:
                weight.data.zero_()


def _recorder(found: list[tuple[nn.Module, Tensor]], rows: Tensor) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        axis = next((axis for axis in (1, 0) if value.dim() > axis and value.shape[axis] == len(rows)), None)
        if axis is not None:
            found.append((module, value.detach().movedim(axis, 0)[rows].double()))

    return record


def token_errors(values_BSD: Tensor, truth_BSD: Tensor) -> Tensor:
    """|values - truth| / |truth| of each token, [S]."""
    values, truth = values_BSD.double(), truth_BSD.double()
    return ((values - truth).norm(dim=(0, 2)) / truth.norm(dim=(0, 2)).clamp_min(1e-30)).nan_to_num(0.0)


def unit_of(weights: Iterable[Tensor], like_BSD: Tensor) -> float:
    """The unit in the last place of the narrowest dtype that is computed with."""
    kind = like_BSD.device.type
    dtypes = {like_BSD.dtype, *(weight.dtype for weight in weights)}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    # Quantised weights are computed with in bfloat16, mostly.
    units = [torch.finfo(dtype if dtype.is_floating_point else torch.bfloat16).eps for dtype in dtypes]
    tf32 = kind == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(*units, torch.finfo(torch.float16).eps if tf32 else FP32_UNIT)
