"""Packed rows in real models: summed loss and every gradient are those of the documents one at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedModel
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

import hf_fpdt.engine.layer_run
import hf_fpdt.model.layers
import hf_fpdt.model.scoring.head_call
from hf_fpdt import FPDTPlugin, apply_fpdt
from hf_fpdt.engine.recurrent import StandInCache
from hf_fpdt.layout.documents import Documents
from hf_fpdt.memory.kv import KVStore
from hf_fpdt.parallel.packed_scans import ChunkDocuments
from tests.helpers.kinds import FAMILIES, TOLERANCE, in_double, kind, with_adapters
from tests.helpers.models import CHUNK, PLUGIN, Step, assert_same_step, taken_step, tiny, tokens, train_step
from tests.helpers.packed import PACKINGS, moved, positions, random_lengths
from tests.helpers.support import assert_rejects

IDS = tokens(1, 40)
HOST: dict[str, Any] = {"device_budget_gib": 0, "host_budget_gib": 1}


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with in_double():
        yield


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    return kind(name, **changes) if name in FAMILIES else tiny(name, attention="eager", **changes)


def alone(model: nn.Module, documents: Documents, ids: Tensor = IDS) -> Step:
    """Summed loss and gradients of a plain model, one document at a time."""
    losses = [
        model(input_ids=part, labels=part, num_items_in_batch=1).loss
        for part in ids.split(documents.lengths, dim=1)
        if part.shape[1] > 1
    ]
    total = torch.stack(losses).sum()
    total.backward()
    return taken_step(model, total)


def ours(model: nn.Module, documents: Documents, plugin: FPDTPlugin = PLUGIN, ids: Tensor = IDS, **marks: Any) -> Step:
    """The same of one packed row in chunks."""
    model = copy.deepcopy(model)
    apply_fpdt(model, plugin)
    marks = marks or {"position_ids": positions(documents)}
    return train_step(model, ids, num_items_in_batch=1, **marks)


def assert_exact(step: Step, truth: Step) -> None:
    assert_same_step(step, truth, TOLERANCE)


NAMES = ["llama", "gpt_neox", "mistral", "gpt_oss", "gemma2", "deepseek_v3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_row_is_its_documents_one_at_a_time(name: str) -> None:
    """Of length 1, ending on borders of chunks, longer than several chunks, one alone; at random."""
    model = model_of(name)
    packings = [lengths for lengths in PACKINGS if max(lengths) > 1]
    for lengths in [*packings, *(random_lengths(seed, 40) for seed in range(4))]:
        documents = Documents.of_lengths(lengths)
        truth = alone(model, documents)
        assert truth.loss.dtype == torch.float64
        assert_exact(ours(model, documents), truth)
    documents = Documents.of_lengths(PACKINGS[6])
    truth = alone(model, documents)
    wrong = {"off by one": moved(documents), "off by minus one": moved(documents, -1)}
    wrong |= {"another row's": Documents.of_lengths(reversed(documents.lengths)), "none": Documents((0,), 40)}
    broken = {what: with_boundaries(model, documents, each) for what, each in wrong.items()}
    broken |= {"labels across boundaries": with_labels_across(model, documents)}
    assert_rejects(lambda step: assert_exact(step, truth), broken)


def with_boundaries(model: nn.Module, documents: Documents, wrong: Documents) -> Step:
    """Layers see other boundaries than positions and labels have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.model.layers, "documents_of_batch", lambda: wrong)
        return ours(model, documents)


def with_labels_across(model: nn.Module, documents: Documents) -> Step:
    """What a document ends with predicts what the next one begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_fpdt.model.scoring.head_call, "without_ends", lambda labels, *_: labels)
        return ours(model, documents)


@pytest.mark.parametrize("place", [{}, HOST, {"device_budget_gib": 2e-5, "host_budget_gib": 1}], ids=str)
@pytest.mark.parametrize("checkpoints", ["attention", "input", "segment"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_checkpoints_wherever_they_lie_are_exact(name: str, checkpoints: str, place: dict[str, Any]) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gpt_oss" else {}
    model: nn.Module = model_of(name, num_hidden_layers=4, **layers)
    model = with_adapters(model) if name == "llama" else model
    plugin = FPDTPlugin(chunk_tokens=CHUNK, loss_chunk_tokens=6, checkpoints=checkpoints, **place)
    for lengths in (PACKINGS[5], PACKINGS[6], random_lengths(9, 40)):
        documents = Documents.of_lengths(lengths)
        assert_exact(ours(model, documents, plugin), alone(model, documents))


def test_every_chunk_and_every_document_count() -> None:
    """Random rows, random chunks: a property."""
    model = model_of("llama", num_hidden_layers=1)
    for seed in range(20):
        length = 17 + 3 * seed
        documents, ids = Documents.of_lengths(random_lengths(seed, length)), tokens(1, length, seed)
        plugin = FPDTPlugin(chunk_tokens=1 + seed % 13, loss_chunk_tokens=5, kernel=("auto", "math")[seed % 2])
        assert_exact(ours(model, documents, plugin, ids), alone(model, documents, ids))


# -- what marks documents ---------------------------------------------------------------------------------------------


def flattened(**options: Any) -> tuple[Documents, dict[str, Any]]:
    lengths = (3, 25, 4, 8)
    features = [{"input_ids": part[0].tolist()} for part in IDS.split(lengths, dim=1)]
    return Documents.of_lengths(lengths), dict(DataCollatorWithFlattening(**options)(features))


OPTIONS: dict[str, dict[str, bool]] = {
    "positions": {},
    "flash": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_transformers_collator_emits_is_taken_as_it_is(options: str, name: str) -> None:
    """Positions restart even where the collator gives none: a model that has learned them sees it."""
    dropout: dict[str, Any] = (
        {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "n_positions": 64} if name == "gpt2" else {}
    )
    model = tiny(name, attention="eager", **dropout)
    documents, batch = flattened(**OPTIONS[options])
    assert ("position_ids" in batch) == (options in ("positions", "all"))
    marks = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
    assert_exact(ours(model, documents, ids=batch["input_ids"], **marks), alone(model, documents))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_idx": torch.arange(40)[None] // 20}, r"disagrees \(documents by cu_seq_lens_q 4, .*seq_idx 2"),
        ({"position_ids": torch.arange(40)[None]}, "disagrees.*position_ids 1"),
        ({"cu_seq_lens_k": torch.tensor([0, 3, 28, 33, 40])}, "disagrees.*cu_seq_lens_k 4"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 28, 32, 39])}, "ascend from 0 to the row's 40 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 28, 3, 40])}, "ascend from 0"),
        ({"seq_idx": torch.zeros(1, 39)}, "seq_idx marks 39 tokens, and the row has 40"),
        ({"attention_mask": torch.ones(1, 40, dtype=torch.long)}, "attention_mask beside cu_seq_lens_q"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_boundaries_that_disagree_are_refused(changes: dict[str, Tensor], message: str) -> None:
    _, batch = flattened(**OPTIONS["all"])
    model = tiny()
    apply_fpdt(model, PLUGIN)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        model(**batch | changes)


def test_the_bare_attention_function_takes_marks_too() -> None:
    """Without apply_fpdt; positions that restart make a mask there, which is refused in training."""
    documents, batch = flattened(**OPTIONS["flash"])
    model = tiny(attention="fpdt")
    assert_exact(train_step(model, num_items_in_batch=1, ids=batch.pop("input_ids"), **batch), alone(model, documents))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q mark one row"):
        model(input_ids=tokens(2, 40), cu_seq_lens_q=batch["cu_seq_lens_q"])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "afmoe"])
def test_the_bare_attention_function_refuses_documents_that_would_see_one_another(name: str) -> None:
    """Beside a cache no model makes a mask of positions, and some never do."""
    model, documents = model_of(name), Documents.of_lengths((13, 20, 7))
    model.set_attn_implementation("fpdt")
    with pytest.raises(NotImplementedError, match="position_ids restart.*apply_fpdt|a mask other than causal"):
        model(input_ids=IDS, position_ids=positions(documents), use_cache=False)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="position_ids restart"):
            model(input_ids=IDS, position_ids=positions(documents), use_cache=True)
    for begins in (0, 5):
        one = torch.arange(begins, begins + 40)[None]
        assert torch.isfinite(model(input_ids=IDS, position_ids=one, use_cache=True).logits).all()


def test_a_row_under_a_mask_is_one_document_as_for_transformers() -> None:
    """Positions may have gaps then (PoSE), but not restart."""
    model, mask = tiny(), torch.ones(1, 40, dtype=torch.long)
    gaps = (torch.arange(40) + 5 * (torch.arange(40) > 20))[None]
    truth = train_step(model, IDS, position_ids=gaps, attention_mask=mask)
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    assert_same_step(train_step(applied, IDS, position_ids=gaps, attention_mask=mask), truth)
    with pytest.raises(NotImplementedError, match="attention_mask beside position_ids that restart"):
        applied(input_ids=IDS, labels=IDS, position_ids=torch.arange(40)[None] % 20, attention_mask=mask)


# -- rows of several lengths ------------------------------------------------------------------------------------------


def padded_batch(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = tokens(len(lengths), max(lengths), seed=4)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "gpt_oss"])
def test_padding_is_neither_counted_nor_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    widths: set[int] = set()
    run = hf_fpdt.model.layers.run_layer

    def noted(layer_run: Any, hidden: Tensor, parameters: Any) -> tuple[Tensor, Tensor | None]:
        widths.add(hidden.numel())
        return run(layer_run, hidden, parameters)

    monkeypatch.setattr(hf_fpdt.model.layers, "run_layer", noted)
    for lengths in ((40, 17, 3), (9, 31), (5, 40), (33,)):
        batch = padded_batch(lengths)
        batch |= {"attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 2))}
        batch |= {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 2))}
        batch |= {"labels": torch.nn.functional.pad(batch["labels"], (0, 2), value=-100)}
        steps = []
        for each in (model, applied):
            loss = each(**batch).loss
            loss.backward()
            steps.append(taken_step(each, loss))
        assert_exact(steps[1], steps[0])
        assert widths == {sum(lengths) * 32}, "padding goes through the layers"
        widths.clear()
        with torch.no_grad():
            in_chunks = applied(**batch, logits_to_keep=torch.tensor([0, 2]))
            plain = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, [0, 2]]
        assert abs(steps[0].loss - in_chunks.loss) <= TOLERANCE * steps[0].loss
        assert (plain - in_chunks.logits).abs().max() < 1e-9
        widths.clear()


def test_noise_of_embeddings_is_that_of_the_rows_as_they_are_given() -> None:
    """NEFTune's goes by their number of tokens, padding too: of rows put into one it would be another."""

    def noisy(model: Any, alpha: float = 5.0) -> Step:
        hook = activate_neftune(model, alpha)
        torch.manual_seed(0)
        batch = padded_batch((9, 20, 4))
        step = train_step(model, batch.pop("input_ids"), batch.pop("labels"), **batch)
        deactivate_neftune(model, hook)
        return step

    model, applied = tiny(), tiny()
    apply_fpdt(applied, PLUGIN)
    truth = noisy(model)
    assert_same_step(noisy(applied), truth)
    assert_rejects(lambda step: assert_same_step(step, truth), {"another scale": noisy(applied, 4.0)})


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_what_the_caller_says_of_a_rows_last_token_counts(rows: str) -> None:
    """Rows are cut out of longer texts, say, and their next tokens known: that another row follows ends nothing."""
    model, applied, batch = tiny(), tiny(), padded_batch((9, 20))
    apply_fpdt(applied, PLUGIN)
    following = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    following[:, [8, -1]] = torch.tensor([[7, -100], [7, 7]])
    if rows == "packed":
        del batch["attention_mask"]
        batch |= {"position_ids": torch.arange(20).repeat(2, 1) % torch.tensor([[20], [13]])}
        following[:, [12, -1]] = torch.tensor([[7, 7], [-100, 7]])
    ids, given = batch.pop("input_ids"), {**batch, "use_cache": False, "shift_labels": following}
    given.pop("labels")
    truth = train_step(model, ids, following, **given)
    assert_same_step(train_step(applied, ids, following, **given), truth)
    given["shift_labels"] = following.index_fill(1, torch.tensor([8, 19]), -100)
    broken = {"last tokens predict nothing": train_step(model, ids, following, **given)}
    assert_rejects(lambda step: assert_same_step(step, truth), broken)


def test_hidden_states_of_a_padded_batch_come_back_as_rows() -> None:
    model = tiny()
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    batch = padded_batch((12, 20))
    mask = batch.pop("attention_mask")
    for labels in ({}, {"labels": batch.pop("labels")}):
        plain, ours = (
            m(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True, **labels)
            for m in (model, applied)
        )
        for a, b in zip(plain.hidden_states, ours.hidden_states, strict=True):
            assert a.shape == b.shape and torch.allclose(a[mask.bool()], b[mask.bool()], atol=1e-6)
            assert not b[mask == 0].any()


def test_packed_rows_of_a_batch_are_taken() -> None:
    model = tiny()
    applied = copy.deepcopy(model)
    apply_fpdt(applied, PLUGIN)
    rows, ids = [Documents.of_lengths(each) for each in ((3, 25, 12), (40,), (39, 1))], tokens(3, 40)
    truth = [alone(model, documents, ids[[row]]) for row, documents in enumerate(rows)]
    places = torch.cat([positions(documents) for documents in rows])
    step = train_step(applied, ids, position_ids=places, num_items_in_batch=1)
    grads = {name: torch.stack([each.grads[name] for each in truth]).sum(0) for name in truth[0].grads}
    assert_same_step(step, Step(torch.stack([each.loss for each in truth]).sum(), grads), TOLERANCE)


# -- nothing in vain --------------------------------------------------------------------------------------------------


class Counting(KVStore):
    """Which chunks were put, and which keys were read, in the order of passes."""

    stores: list[Counting] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.puts: list[int] = []
        self.keys: set[int] = set()
        Counting.stores.append(self)

    def put(self, chunk: Any, k_BSGH: Tensor, v_BSGH: Tensor) -> None:
        self.puts.append(chunk.index)
        super().put(chunk, k_BSGH, v_BSGH)


def puts_of(documents: Documents, plugin: FPDTPlugin, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    Counting.stores.clear()
    monkeypatch.setattr(hf_fpdt.engine.layer_run, "KVStore", Counting)
    ours(model_of("llama", num_hidden_layers=1), documents, plugin)
    return [store.puts for store in Counting.stores]


@pytest.mark.parametrize("place", [{}, HOST], ids=["device", "host"])
def test_chunks_without_a_common_document_are_not_captured_again(
    place: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = FPDTPlugin(chunk_tokens=CHUNK, checkpoints="input", **place)
    forward, backward = puts_of(Documents.of_lengths([8, 16, 8, 8]), plugin, monkeypatch)
    assert forward == [0, 1, 2, 3, 4]
    # A chunk of its own documents comes with its replay; chunk 1 is captured for the row of chunk 2.
    assert backward == [4, 3, 1, 2, 0]
    _, backward = puts_of(Documents((0,), 40), plugin, monkeypatch)
    assert backward == [0, 1, 2, 3, 4]


def test_progress_counts_the_pairs_that_are_computed() -> None:
    from hf_fpdt.layout.chunks import ChunkPlan
    from hf_fpdt.plan.checkpointing import KeptLayers
    from hf_fpdt.plan.operations import pass_work
    from hf_fpdt.plan.sizes import StepSizes
    from tests.helpers.stores import TINY

    documents = Documents.of_lengths([8, 16, 8, 8])
    kept = KeptLayers((True,) * TINY.layers, (True,) * TINY.layers)
    whole, packed = (
        pass_work(StepSizes(TINY, ChunkPlan(40, 8), documents=each), kept, full=False) for each in (None, documents)
    )
    fewer = (40**2 - 8**2 - 16**2 - 8**2 - 8**2) / 2
    attention = TINY.attention_forward(fewer) + TINY.attention_backward(fewer)
    assert whole.done - packed.done == pytest.approx(TINY.layers * attention)
    assert whole.strict - packed.strict == pytest.approx(TINY.layers * 3 * TINY.attention_forward(fewer))


def test_queries_scaled_by_their_place_are_exact() -> None:
    """Llama 4's, which ask how many tokens came before."""
    test_a_packed_row_is_its_documents_one_at_a_time("llama4_text")
    model, documents = kind("llama4_text"), Documents.of_lengths(PACKINGS[6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkDocuments, "before_own", lambda self, device: torch.full((len(self.own),), self.own.start))
        assert_rejects(
            lambda step: assert_exact(step, alone(model, documents)), {"of the row": ours(model, documents)}
        )


def test_layers_that_cannot_tell_documents_apart_refuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that would do arithmetic of Python with how many tokens came before."""
    right = StandInCache.get_seq_length
    monkeypatch.setattr(StandInCache, "get_seq_length", lambda self, *_: int(right(self)))
    with pytest.raises(NotImplementedError, match="does not take a packed row of 7 documents: it .*how many tokens"):
        ours(kind("llama4_text"), Documents.of_lengths(PACKINGS[6]))
