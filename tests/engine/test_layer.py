"""The layer executor and the chunked loss together: loss and every gradient against the whole model done naively."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_fpdt.attention.online
import hf_fpdt.engine.calls
import hf_fpdt.engine.layer
import hf_fpdt.engine.loss
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.attention.kernels.table import KERNELS
from hf_fpdt.attention.spec import AttentionSpec
from tests.helpers.support import assert_as_accurate, assert_rejects
from tests.helpers.truth import in_double, loss_and_gradients, tiny, truth

FAMILIES = ["llama", "neox", "neox-sequential"]
POLICIES = ["attention", "input"]
Results = dict[str, Tensor]


def batch(n_tokens: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids, and labels of which some do not count (never the one that a single pair would need)."""
    ids = torch.randint(0, 97, (rows, n_tokens))
    ignored = (torch.rand(ids.shape) < 0.2) & (torch.arange(n_tokens) != 1)
    return ids, ids.masked_fill(ignored, -100)


def with_fpdt(model: PreTrainedModel, ids: Tensor, labels: Tensor, **settings: object) -> Results:
    model = copy.deepcopy(model)
    handle = apply_fpdt(model, FPDTPlugin(**settings))  # type: ignore[arg-type]
    results = loss_and_gradients(model, ids, labels)
    handle.remove()
    return results


def with_lora(model: PreTrainedModel, dropout: float = 0.0) -> PreTrainedModel:
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).double()


def assert_equal(ours: Results, exact: Results, tolerance: float) -> None:
    assert ours.keys() == exact.keys()
    for name, expected in exact.items():
        # A gradient that vanishes mathematically (a key's bias) is rounding alone: measure it against the others.
        size = max(float(expected.abs().max()), 1e-6)
        error = float((ours[name] - expected).abs().max()) / size
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpoints", POLICIES)
@pytest.mark.parametrize(
    ("n_tokens", "chunk", "rows"), [(2, 1, 1), (63, 16, 3), (64, 16, 1), (1000, 384, 1), (63, 64, 3)]
)
def test_double_model_is_equal_to_float64_rounding(
    family: str, checkpoints: str, n_tokens: int, chunk: int, rows: int
) -> None:
    model, (ids, labels) = in_double(tiny(family)), batch(n_tokens, rows)
    ours = with_fpdt(model, ids, labels, chunk_tokens=chunk, checkpoints=checkpoints, loss_chunk_tokens=50)
    assert_equal(ours, truth(model, ids, labels), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpoints", POLICIES)
def test_lora_is_equal_to_float64_rounding(family: str, checkpoints: str) -> None:
    model, (ids, labels) = with_lora(in_double(tiny(family))), batch(63, 3)
    ours = with_fpdt(model, ids, labels, chunk_tokens=16, checkpoints=checkpoints)
    assert_equal(ours, truth(model, ids, labels), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_model_is_within_twice_the_error_of_eager(family: str) -> None:
    """With transformers' own fp32 casts in place, ours is as near to the truth as its eager path is."""
    model, (ids, labels) = tiny(family), batch(200, 2)
    exact = truth(in_double(model), ids, labels)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    naive = loss_and_gradients(eager, ids, labels)
    ours = with_fpdt(model, ids, labels, chunk_tokens=64)
    for name in exact:
        assert_as_accurate(ours[name].double(), naive[name].double(), exact[name], name=name)


def test_one_token_without_a_label_gives_what_transformers_gives() -> None:
    """A sequence of one token has no next token: the mean over no label is NaN there and here."""
    model, ids = tiny("llama"), torch.tensor([[5]])
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=8))
    loss = model(input_ids=ids, labels=ids).loss
    handle.remove()
    assert loss.isnan() and model(input_ids=ids, labels=ids).loss.isnan()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_policies_agree_to_rounding(family: str) -> None:
    model, (ids, labels) = in_double(tiny(family)), batch(100, 2)
    kept, rerun = (with_fpdt(model, ids, labels, chunk_tokens=32, checkpoints=policy) for policy in POLICIES)
    assert_equal(kept, rerun, 1e-14)


@pytest.mark.parametrize("checkpoints", POLICIES)
@pytest.mark.parametrize("case", ["lora", "hidden"])
def test_dropout_of_one_chunk_draws_as_the_plain_model_does(case: str, checkpoints: str) -> None:
    """With one chunk the draws come in the plain model's order, so a seed gives the same masks."""
    lora = case == "lora"
    model = with_lora(in_double(tiny("llama")), dropout=0.3) if lora else tiny("neox", hidden_dropout=0.2)
    ids, labels = batch(63, 2)
    torch.manual_seed(3)
    exact = truth(model, ids, labels)
    torch.manual_seed(3)
    ours = with_fpdt(model, ids, labels, chunk_tokens=64, checkpoints=checkpoints)
    assert_equal(ours, exact, 1e-10)
    torch.manual_seed(4)
    other_masks = with_fpdt(model, ids, labels, chunk_tokens=64, checkpoints=checkpoints)
    assert_rejects(lambda results: assert_equal(results, exact, 1e-10), {"other masks": other_masks})


@pytest.mark.parametrize("checkpoints", POLICIES)
@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_dropout_over_chunks_has_the_gradient_of_its_own_loss(family: str, checkpoints: str) -> None:
    """Backward must see forward's masks in every chunk: its gradient is the slope of the seeded loss."""
    model, (ids, labels) = tiny(family, hidden_dropout=0.2), batch(40, 1)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16, checkpoints=checkpoints))

    def seeded_loss() -> Tensor:
        torch.manual_seed(5)
        return model(input_ids=ids, labels=labels).loss

    seeded_loss().backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            steps = []
            for step in (1e-5, -1e-5):
                parameter.add_(direction, alpha=step)
                steps.append(float(seeded_loss()))
                parameter.add_(direction, alpha=-step)
        measured = (steps[0] - steps[1]) / 2e-5
        assert measured == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_the_random_stream_goes_on_after_backward_as_after_forward() -> None:
    model, (ids, labels) = tiny("neox", hidden_dropout=0.2), batch(40)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=labels).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_broken_variants_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: each of these bugs makes it."""
    model, (ids, labels) = in_double(tiny("llama")), batch(63, 2)
    exact = truth(model, ids, labels)

    def check(run: Callable[[], Results]) -> None:
        assert_equal(run(), exact, 1e-10)

    def broken(**changes: object) -> Callable[[], Results]:
        def run() -> Results:
            with monkeypatch.context() as patch:
                for name, value in changes.items():
                    places = (hf_fpdt.engine.layer, hf_fpdt.engine.calls, hf_fpdt.attention.rows)
                    patch.setattr(next(place for place in places if hasattr(place, name)), name, value)
                return with_fpdt(model, ids, labels, chunk_tokens=16, kernel="math")

        return run

    spans = hf_fpdt.attention.rows.kernel_spans

    def one_dropped(*args: Any, **kwargs: Any) -> object:
        diagonal, *others = spans(*args, **kwargs)
        return [diagonal, *others[1:]]

    def unmasked(*args: Any, **kwargs: Any) -> object:
        return [dataclasses.replace(s, causal=False) for s in spans(*args, **kwargs)]

    def half(spec: AttentionSpec) -> AttentionSpec:
        return dataclasses.replace(spec, scale=spec.scale / 2)

    half_scale = dataclasses.replace(
        KERNELS["math"],
        forward=lambda *a, causal, spec: KERNELS["math"].forward(*a, causal=causal, spec=half(spec)),
        backward=lambda *a, causal, spec: KERNELS["math"].backward(*a, causal=causal, spec=half(spec)),
    )
    check(broken())
    assert_rejects(
        check,
        {
            "dropped chunk": broken(kernel_spans=one_dropped),
            "unmasked diagonal": broken(kernel_spans=unmasked),
            "wrong scale": broken(select_kernel=lambda *_: half_scale),
            "labels off by one": lambda: with_fpdt(model, ids, labels.roll(1, dims=1), chunk_tokens=16),
            "gradients of the last chunk alone": broken(
                GradientSums=type("Forgetful", (hf_fpdt.engine.gradients.GradientSums,), {"_add": _last_wins})
            ),
        },
    )


def _last_wins(self: hf_fpdt.engine.gradients.GradientSums, key: int, grad: Tensor) -> None:
    self._sums[key] = grad


def test_parameter_gradients_add_up_in_fp32() -> None:
    """bf16 sums over 64 chunks would lose most of each chunk's bits; ours stay as near as the plain model's."""
    model, (ids, labels) = tiny("neox"), batch(256)
    exact = truth(model, ids, labels)
    narrow = copy.deepcopy(model).bfloat16()
    naive = copy.deepcopy(narrow)
    naive.set_attn_implementation("sdpa")
    plain, ours = loss_and_gradients(naive, ids, labels), with_fpdt(narrow, ids, labels, chunk_tokens=8)
    for name in exact:
        size = float(exact[name].norm())
        plain_error, our_error = (float((x[name].double() - exact[name]).norm()) / size for x in (plain, ours))
        assert our_error < 1.5 * plain_error + 0.005, f"{name}: {our_error:.3f} against {plain_error:.3f}"


# -- on a GPU ---------------------------------------------------------------------------------------------------------

LLAMA_8B_LAYER = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)


def on_gpu(config: LlamaConfig) -> LlamaForCausalLM:
    """A bf16 model with random weights made on the GPU: 1.3 billion of them take a CPU twenty seconds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cuda")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device="cuda")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoints", POLICIES)
def test_gpu_one_8b_layer_is_as_accurate_as_transformers(checkpoints: str) -> None:
    """8,192 tokens through one layer of Llama-3.1-8B's shape in bf16; the truth is the same model in fp32."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = on_gpu(LLAMA_8B_LAYER)
    with torch.no_grad():
        for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            projection.weight.mul_(4)
    ids = torch.randint(0, 128_256, (1, 8192), device="cuda")
    layer = model.model.layers[0]
    ours = with_fpdt_gpu(model, ids, checkpoints)
    naive = loss_and_gradients_of(layer, model, ids)
    wide = model.float()
    exact = loss_and_gradients_of(layer, wide, ids)
    for name in exact:
        size = exact[name].norm()
        our_error, naive_error = (float((x[name].float() - exact[name]).norm() / size) for x in (ours, naive))
        assert our_error <= 2 * naive_error, f"{name}: ours {our_error:.2e}, transformers {naive_error:.2e}"


def with_fpdt_gpu(model: LlamaForCausalLM, ids: Tensor, checkpoints: str) -> Results:
    handle = apply_fpdt(model, FPDTPlugin(chunk_tokens=2048, checkpoints=checkpoints))
    results = loss_and_gradients_of(model.model.layers[0], model, ids)
    handle.remove()
    return results


def loss_and_gradients_of(layer: torch.nn.Module, model: LlamaForCausalLM, ids: Tensor) -> Results:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: cast(Tensor, p.grad).clone() for name, p in layer.named_parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoints", POLICIES)
def test_gpu_no_tensor_of_tokens_by_intermediate_or_vocabulary_is_ever_made(checkpoints: str) -> None:
    """One 8B-shape layer at 131,072 tokens: every single allocation, and the peak, stay below such a tensor's size."""
    n_tokens, unit = 131_072, 131_072 * 4096 * 2
    model = on_gpu(LLAMA_8B_LAYER)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    apply_fpdt(model, FPDTPlugin(chunk_tokens=8192, checkpoints=checkpoints))
    ids = torch.randint(0, 128_256, (1, n_tokens), device="cuda")
    model(input_ids=ids[:, :8192], labels=ids[:, :8192]).loss.backward()  # kernels compile, libraries take workspaces
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    largest = max(event["size"] for event in trace if event["action"] == "alloc")
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{checkpoints}: largest allocation {largest / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB over the weights")
    assert largest < n_tokens * LLAMA_8B_LAYER.intermediate_size * 2
    # Hidden states before and after the layer and the norm, their gradients, attention output: eight of them, K, V
    # and fp32 dK, dV (1.5 more), and what a chunk and the loss need. A [tokens, intermediate] tensor is 3.5 units.
    assert peak < 9 * unit


def test_everything_runs_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and flash-attn-4 launch on the process's current GPU; backward passes are autograd's, which sets it."""
    inside, seen = [0], list[str]()

    class Entered(torch.cuda.device_of):
        def __enter__(self) -> None:
            inside[0] += 1
            super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            inside[0] -= 1
            return super().__exit__(*error)

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert inside[0] == 1, name
            seen.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.cuda, "device_of", Entered)
    for module, name in (
        (hf_fpdt.engine.whole, "forward_row"),
        (hf_fpdt.engine.calls, "forward_row"),
        (hf_fpdt.engine.loss, "cross_entropy"),
    ):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    model, ids = tiny("llama", attn_implementation="fpdt"), torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        model(input_ids=ids)
    assert set(seen) == {"forward_row"}, "the registered function alone, without apply_fpdt"
    apply_fpdt(model, FPDTPlugin(chunk_tokens=16))
    mlp = model.model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", watched("mlp", mlp.forward))
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    hf_fpdt.engine.loss.norm_by_chunks(watched("norm", torch.clone), torch.zeros(1, 4, 2), [], 2)
    assert set(seen) == {"forward_row", "cross_entropy", "mlp", "norm"} and inside == [0]
