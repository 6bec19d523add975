"""Is FPDT right on this machine, for this model? Our errors beside those of plain attention, for every kernel here.

Both are measured against the same computation in float64; `commands.accuracy` has the rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...attention import KERNELS, AttentionSpec, attention, peaked_qkv
from ...config import FPDTPlugin
from ...engine import attend_whole, plain_kernels
from ...model import apply_fpdt, build_random, dequantise, quantise, with_lora
from ...plan import attention_sizes, head_dims, largest, why_no_sizes, windows_of
from ..accuracy import LOSS, Tensors, Worst, errors, in_double, worst_of_run
from ..float64 import float64_throughout
from ..options import plain
from .adapter import Adapter
from .tiny_config import VOCABULARY, shrunk

ATTENTION_TOKENS = 500
TRAINING_TOKENS, CHUNK_TOKENS, LOSS_TOKENS = 150, 64, 40  # ragged chunks
DOCUMENT_TOKENS = (70, 1, 57, 22)  # of a packed row: one that goes on into the next chunk, one of a token
# Scores then have a standard deviation of a few units: a softmax with peaks.
WEIGHT_GAIN, VECTOR_NOISE = 2.0, 0.1
# Adapters add products of two such matrices, some times over.
ADAPTER_GAIN = 0.2

Attend = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kernel in one comparison.

    Attributes:
        kernel: its name.
        what: "attention" alone on peaked inputs, or loss and gradients of the tiny model, on one document
            ("training") or on a packed row of several ("documents").
        dtype: of the inputs or of the model.
        worst: the tensor with the largest error beside the plain one's, or what the kernel said when it did not run.
        ratio: that error over the plain one's; NaN where a tensor holds one, infinite where it did not run.
    """

    kernel: str
    what: str
    dtype: torch.dtype
    worst: str
    ratio: float

    @property
    def passed(self) -> bool:
        """Whether it is as accurate as the plain one; a NaN is not."""
        return Worst(self.worst, self.ratio).passed


def kinds_of(config: Any) -> list[AttentionSpec]:
    """The kinds of attention in a text configuration's layers, each once; sinks make none, any kernel has them."""
    if why_no_sizes(config):
        return [AttentionSpec.plain(head_dim) for head_dim in head_dims(config)]
    heads, kv_heads, head_dim, value_dim = attention_sizes(config)
    if not head_dim:
        return []  # no layer attends
    softcap = largest(config, "attn_logit_softcapping")
    return [
        AttentionSpec(
            scale=head_dim**-0.5,
            head_dim=head_dim,
            value_dim=value_dim,
            grouped=heads != kv_heads,
            window=window,
            softcap=softcap,
        )
        for window in dict.fromkeys(windows_of(config))
    ]


def kernels_here(device: torch.device, dtype: torch.dtype, spec: AttentionSpec) -> dict[str, str | None]:
    """By kernel, why it cannot serve; None where it can. In the order in which "auto" looks."""
    return {name: kernel.why_not(device, dtype, spec) for name, kernel in KERNELS.items()}


def training_dtype(device: torch.device) -> torch.dtype:
    """What models are trained in on such a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_dtype(kernel: str, device: torch.device, kinds: Sequence[AttentionSpec]) -> torch.dtype | None:
    """The widest dtype that the kernel takes for all kinds, for errors stand out most there; None where in none."""
    why_not, widest = KERNELS[kernel].why_not, (torch.float32, torch.bfloat16)
    return next((dtype for dtype in widest if not any(why_not(device, dtype, spec) for spec in kinds)), None)


# -- attention alone --------------------------------------------------------------------------------------------------


def check_attention(
    kernel: str, dtype: torch.dtype, heads: tuple[int, int], spec: AttentionSpec, device: Any
) -> Finding:
    """The kernel's output and gradients on inputs whose softmax is peaked.

    Args:
        heads: query and key/value heads.
    """
    n, width = ATTENTION_TOKENS, max(spec.head_dim, spec.value_dim)
    q, k, v = (x.to(device) for x in peaked_qkv(1, n, n, *heads, width, dtype))
    qkv = [q[..., : spec.head_dim], k[..., : spec.head_dim], v[..., : spec.value_dim]]
    shape = (*q.shape[:3], spec.value_dim)
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    kind: dict[str, Any] = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}

    def run(attend: Attend, to: torch.dtype) -> Tensors:
        leaves = [x.to(to).requires_grad_() for x in qkv]
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, dout.to(to))
        return dict(zip(("output", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))

    def by_hand(*leaves: Tensor) -> Tensor:
        return attention(*leaves, **kind)[0]

    try:
        ours = run(functools.partial(attend_whole, **kind, kernel=kernel), dtype)
    except RuntimeError as error:  # what kernels raise that do not run on this GPU
        found = Worst(" ".join(str(error).split()), float("inf"))
    else:
        truth = run(by_hand, torch.float64)
        plain = run(by_hand, dtype)
        if spec.softcap is None:  # which PyTorch has not
            plain = _less_accurate(plain, run(functools.partial(_sdpa, spec=spec), dtype), truth)
        found = worst_of_run(ours, plain, truth)
    return Finding(kernel=kernel, what="attention", dtype=dtype, worst=found.name, ratio=found.ratio)


def _sdpa(q_BSNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, *, spec: AttentionSpec) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSNH, k_BTGH, v_BTGH))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    mask = None if spec.window is None else seen.triu(1 - spec.window)
    how: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": spec.scale, "enable_gqa": True}
    return scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


def _less_accurate(a: Tensors, b: Tensors, truth: Tensors) -> Tensors:
    """Of the two ways that a user has, tensor by tensor: which one is better depends on the dtype."""
    of_a, of_b = errors(a, truth), errors(b, truth)
    return {name: b[name] if of_b[name] > of_a[name] else a[name] for name in truth}


# -- training a tiny copy of the model --------------------------------------------------------------------------------


class NothingToCompare(Exception):
    """A small model of this configuration does not run even by itself, so nothing can be said."""


class TinyModel:
    """Training steps of a small model with a configuration's features, plain and with FPDT.

    Args:
        config: of the large model; it is shrunk here.
        device: where the steps run.
        adapter: what is trained around it; None: every weight.
        quantised: how its linears are held, "nf4" or "int8", under adapters then; None: as every other weight.

    Attributes:
        refused_documents: why it takes no packed rows, where that was found.
    """

    def __init__(
        self, config: Any, device: torch.device, adapter: Adapter | None = None, quantised: str | None = None
    ) -> None:
        self.config, self.device, self.adapter, self.quantised = shrunk(config), device, adapter, quantised
        words = min(VOCABULARY, self.config.vocab_size)
        self._ids = torch.randint(3, words, (1, TRAINING_TOKENS), generator=torch.Generator().manual_seed(0))
        self._plain: dict[tuple[torch.dtype, bool], Tensors] = {}
        self.refused_documents: str | None = None

    def check(self, kernel: str, dtype: torch.dtype) -> Finding:
        """Loss and every gradient of one step with this kernel.

        Raises:
            NotImplementedError, RuntimeError: the model does what FPDT cannot do in chunks; the message says what.
            NothingToCompare: the small model does not run, without FPDT.
        """
        return self._compared(kernel, dtype, packed=False)

    def check_documents(self, kernel: str, dtype: torch.dtype) -> Finding | None:
        """The same of a packed row, against its documents one at a time; None where such rows are refused."""
        try:
            return self._compared(kernel, dtype, packed=True)
        except NotImplementedError as error:
            self.refused_documents = plain(error)
            return None

    def _compared(self, kernel: str, dtype: torch.dtype, *, packed: bool) -> Finding:
        truth, naive = (self._plain_step(each, packed=packed) for each in (torch.float64, dtype))
        found = worst_of_run(self._step(dtype, kernel, packed=packed), naive, truth)
        what = "documents" if packed else "training"
        return Finding(kernel=kernel, what=what, dtype=dtype, worst=found.name, ratio=found.ratio)

    def _plain_step(self, dtype: torch.dtype, *, packed: bool) -> Tensors:
        """Without FPDT; the same for every kernel."""
        if (dtype, packed) not in self._plain:
            try:
                self._plain[dtype, packed] = self._step(dtype, packed=packed)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise NothingToCompare(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        return self._plain[dtype, packed]

    def _step(self, dtype: torch.dtype, kernel: str | None = None, *, packed: bool) -> Tensors:
        """Loss and gradients, of plain eager attention where no kernel is named."""
        model = self._model(dtype)
        if kernel is not None:
            # All on the host, so that the copies are checked too.
            plugin = FPDTPlugin(
                sp_size=1,
                chunk_tokens=CHUNK_TOKENS,
                kernel=kernel,
                checkpoints="attention",
                device_budget_gib=0,
                host_budget_gib=1,
                loss_chunk_tokens=LOSS_TOKENS,
                disk_dir=None,
                progress=False,
            )
            apply_fpdt(model, plugin)
        ids = self._ids.to(self.device)
        # What is compared with is PyTorch's way of a recurrence, which has float64 too.
        wide = float64_throughout() if dtype == torch.float64 else nullcontext()
        with nullcontext() if kernel is not None else plain_kernels(model), wide:
            loss = torch.stack(_losses(model, ids, packed=packed, one_by_one=kernel is None)).sum()
            loss.backward()
        return {LOSS: loss.detach(), **dict(_gradients(model))}

    def _model(self, dtype: torch.dtype) -> Any:
        """With adapters where some are given, or its linears are quantised; in float64 these are dequantised."""
        model: Any = build_random(self.config, self.device, dtype, False)
        model.set_attn_implementation("eager")
        if dtype == torch.float64:
            model = in_double(model)
        _draw(model.parameters(), WEIGHT_GAIN)
        if self.quantised is not None:
            quantise(model, self.quantised, dtype)
            if dtype == torch.float64:
                dequantise(model, dtype, self.device)
        if self.adapter is not None:
            model = self.adapter.put_on(model, tiny=True)
        elif self.quantised is not None:
            model = with_lora(model)
        if self.adapter is not None or self.quantised is not None:
            _draw((p for p in model.parameters() if p.requires_grad), ADAPTER_GAIN)
        return model


def _losses(model: Any, ids: Tensor, *, packed: bool, one_by_one: bool) -> list[Tensor]:
    """Parts of the loss of a row, which is one document, or packed of several; these one by one if so asked."""
    if not packed:
        return [model(input_ids=ids, labels=ids, use_cache=False).loss]
    if one_by_one:
        parts = [part for part in ids.split(DOCUMENT_TOKENS, dim=1) if part.shape[1] > 1]
        how = {"num_items_in_batch": TRAINING_TOKENS, "use_cache": False}
        return [model(input_ids=part, labels=part, **how).loss for part in parts]
    edges = torch.tensor([0, *DOCUMENT_TOKENS]).cumsum(0).to(ids.device, torch.int32)
    return [model(input_ids=ids, labels=ids, cu_seq_lens_q=edges, num_items_in_batch=TRAINING_TOKENS).loss]


def why_refused_tiny(config: Any) -> str | None:
    """Why `apply_fpdt` will not have a tiny copy with a text configuration's features, whose layers it tries.

    Returns:
        What it says; None if it takes the copy, or if there is none that runs.
    """
    try:
        apply_fpdt(build_random(shrunk(config), "cpu", torch.float32, False), FPDTPlugin(sp_size=1, progress=False))
    except NotImplementedError as error:
        return plain(error)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return None


def _gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def _draw(parameters: Iterable[Tensor], gain: float) -> None:
    """Equal weights in every dtype: drawn on the CPU, and rounded to bfloat16 first."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_((noise * gain / p.shape[-1] ** 0.5).bfloat16())
            else:
                # What a model draws for itself (sinks) would be drawn otherwise in another dtype.
                base = p.cpu().float()
                base = base if bool((base == base.flatten()[:1]).all()) else torch.zeros_like(base)
                p.copy_((base + VECTOR_NOISE * noise).bfloat16())
