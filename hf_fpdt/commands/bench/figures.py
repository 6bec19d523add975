"""What makes steps of different models and machines comparable: operations, MFU two ways, and the ceiling. No torch.

Letters: S tokens of the sequence, L layers, N linear weights of the base model with its head (no adapters, no
embeddings), H query heads × head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...forecast import Corpus
from ...layout import Documents
from ...plan import BACKWARD_OPERATIONS, ModelSizes, attention_of_all, strict_flops

# Keys beyond these change the kernel's rate by less than it varies.
MOST_KEYS = 131_072
# Passes of a layer's linears in a step that keeps only what it must: forward, forward again for the backward pass,
# gradients of inputs; training every weight adds gradients of weights. The loss makes its gradients at once.
LINEAR_PASSES = MappingProxyType({False: 3, True: 4})
HEAD_PASSES = MappingProxyType({False: 2, True: 3})

FORMULAS = """\
strict MFU: S · (4·N + 6·L·S·H) operations with LoRA, S · (6·N + 6·L·S·H) in full (nothing twice, causal attention at
half), over seconds and the GPU's data-sheet peak in bfloat16.
MFU with recompute (the habit of papers): the same and one more forward pass of all layers, S · (2·N' + 2·L·S·H) with
N' the layers' weights alone, whatever the stack really does twice.
of ceiling: the least seconds a step can take that makes what linears give once more for its backward pass, over those
it took. Attention forward once and backward once (2.5 times the operations) at the kernel's rates, linears at the rate
of large matrix products: forward, forward again and gradients of inputs, with weights trained their gradients too; all
rates measured in the same run. Scans of recurrent layers: 6 operations a token and element of their states, forward,
at the rate of products, which no kernel reaches.
of ceiling, nothing twice: the same with each linear forward once, S · 2·N' operations less: what a step could reach
that keeps all that linears give. Where much of that is kept, a step may be above the first and is below the second.
Of several GPUs: tokens of all together, over the peaks and rates of as many; what they send each other is not in the
ceiling. GPU GiB: the fullest; pinned and process GiB: all processes.
With --documents pairs of a query and a key of one document alone count, and attention's rates are of such rows."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations a second, measured.

    Attributes:
        forward, backward: of the attention kernel.
        matmul: of large matrix products.
        kernel: which kernel.
    """

    forward: float
    backward: float
    matmul: float
    kernel: str


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model that is trained: sizes, logits a token, whether every weight trains, and on what rows."""

    sizes: ModelSizes
    vocabulary: int
    full: bool
    documents: Corpus | None = None

    def _row(self, n_tokens: int) -> Documents | None:
        return None if self.documents is None else self.documents.row(n_tokens)

    def strict(self, n_tokens: int) -> float:
        """Operations of a step, none twice."""
        row = self._row(n_tokens)
        return strict_flops(self.sizes, self.vocabulary, n_tokens, full=self.full, documents=row)

    def with_recompute(self, n_tokens: int) -> float:
        """The same, and one more forward pass of all layers."""
        again = n_tokens * sum(2 * mix.linear_weights + mix.scan_operations for mix in self.sizes.all_mixes)
        return self.strict(n_tokens) + again + self._attention(n_tokens)

    def ceiling_seconds(self, n_tokens: int, rates: Rates, *, twice: bool = True) -> float:
        """The least that a step can take at these rates.

        Args:
            twice: whether it makes what linears give once more for its backward pass.
        """
        attention = self._attention(n_tokens)
        products = (LINEAR_PASSES[self.full] - (not twice)) * sum(mix.linear_weights for mix in self.sizes.all_mixes)
        # Forward, forward again and twice that backward, as if matrix units did nothing else.
        products += 2 * sum(mix.scan_operations for mix in self.sizes.mixes)
        products += HEAD_PASSES[self.full] * self.vocabulary * self.sizes.hidden
        kernel = attention / rates.forward + BACKWARD_OPERATIONS * attention / rates.backward
        return kernel + 2 * n_tokens * products / rates.matmul

    def _attention(self, n_tokens: int) -> float:
        """Operations of all layers' attention, forward, of the pairs that they see."""
        return attention_of_all(self.sizes, n_tokens, self._row(n_tokens))

    def figures(
        self, n_tokens: int, seconds: float, peak: float | None, rates: Rates | None, gpus: int = 1
    ) -> Mapping[str, float]:
        """Columns of a row: speed, and what can be said of it where `peak` and `rates` of a GPU are known."""
        found = {"tokens_per_s": n_tokens / seconds}
        if peak is not None:
            found["strict_mfu"] = self.strict(n_tokens) / seconds / (gpus * peak)
            found["mfu_with_recompute"] = self.with_recompute(n_tokens) / seconds / (gpus * peak)
        if rates is not None:
            found["ceiling_s"] = self.ceiling_seconds(n_tokens, rates) / gpus
            found["of_ceiling"] = found["ceiling_s"] / seconds
            found["ceiling_once_s"] = self.ceiling_seconds(n_tokens, rates, twice=False) / gpus
            found["of_ceiling_once"] = found["ceiling_once_s"] / seconds
        return found


def keys_of(n_tokens: int) -> int:
    """Keys at which attention's rate is measured for that length."""
    return min(n_tokens, MOST_KEYS)
