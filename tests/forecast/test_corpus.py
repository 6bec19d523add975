"""Rows of documents in a plan: pairs, not squares, make a step's seconds and its MFU; memory stays as planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_fpdt.commands.main import main
from hf_fpdt.commands.options import UserMistake, corpus_of
from hf_fpdt.forecast.corpus import Corpus
from hf_fpdt.forecast.fit import PlannedStep, fit
from hf_fpdt.layout.spans import seen_pairs
from hf_fpdt.plan.operations import attention_of_all, strict_flops
from tests.forecast.test_fit import ONE, TRAINING
from tests.helpers.support import assert_rejects

LOGNORMAL = Corpus(mean=8192, sigma=1.2)


def test_rows_are_drawn_from_what_is_said() -> None:
    row = LOGNORMAL.row(2**22)
    assert row == LOGNORMAL.row(2**22) and row.n_tokens == 2**22
    assert sum(row.lengths) / len(row.lengths) == pytest.approx(8192, rel=0.15)
    # The last one is cut where the row ends.
    assert set(Corpus(lengths=(5, 7)).row(1000).lengths[:-1]) == {5, 7}
    assert Corpus(lengths=(99,)).row(40).lengths == (40,)
    for wrong in ({}, {"lengths": (5, 0)}, {"mean": 0.5}):
        with pytest.raises(ValueError, match="documents of one token or more"):
            Corpus(**wrong)
    for sigma in ("-1", "nan", "inf"):
        with pytest.raises(UserMistake, match=f"a sigma from 0 is expected, not {float(sigma)}"):
            corpus_of(f"lognormal:8K,{sigma}")


def check(found: PlannedStep, whole: PlannedStep) -> None:
    """Of 256K tokens: the same memory, and seconds and operations less by attention's share."""
    documents = LOGNORMAL.row(2**18)
    assert found.step.documents == documents and found.device == whole.device and found.host == whole.host
    share = seen_pairs(0, 2**18, None, documents) / seen_pairs(0, 2**18, None)
    assert share == pytest.approx(sum(length**2 for length in documents.lengths) / 2**36)
    model, gpu = found.step.model, ONE.gpu
    forward, backward = gpu.attention_rates(model.head_dim, model.value_dim)
    reruns = 1 + whole.plan.kept.attentions.count(False) / model.layers
    saved = (1 - share) * attention_of_all(model, 2**18) * (reruns / forward + 2.5 / backward)
    assert whole.seconds - found.seconds == pytest.approx(saved, rel=1e-6)
    flops = strict_flops(model, found.step.vocabulary, 2**18, full=False, documents=documents)
    assert found.strict_mfu == pytest.approx(flops / found.seconds / gpu.peak)


def test_a_packed_row_takes_the_seconds_of_its_pairs() -> None:
    whole, found = fit(TRAINING, ONE, 2**18), fit(replace(TRAINING, documents=LOGNORMAL), ONE, 2**18)
    check(found, whole)
    broken = {
        "one document": whole,
        "another distribution": fit(replace(TRAINING, documents=Corpus(mean=4096, sigma=1.2)), ONE, 2**18),
        "seconds of the square": replace(found, seconds=whole.seconds),
        "MFU of the square": replace(found, strict_mfu=whole.strict_mfu),
    }
    assert_rejects(lambda step: check(step, whole), broken)


def test_the_command_plans_packed_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--shape", "llama-8b", "--host-mem", "128", "--seq-len", "256K"]
    seconds = {}
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps([1000, 2000, 3000]))
    for documents in (None, "lognormal:8K,1.2", str(lengths)):
        assert main([*words, "--json", *([] if documents is None else ["--documents", documents])]) == 0
        found = json.loads(capsys.readouterr().out)
        seconds[documents] = found["seconds"]
        assert ("documents" in found) == (documents is not None)
    assert (
        found["documents"] == len(Corpus(lengths=(1000, 2000, 3000)).row(2**18).starts)
        and found["share_of_pairs"] < 0.01
    )
    assert seconds[None] > 1.2 * seconds["lognormal:8K,1.2"] > 1.2 * seconds[str(lengths)]
    assert main([*words, "--documents", "lognormal:8K,1.2"]) == 0
    count = len(LOGNORMAL.row(2**18).starts)
    assert f"a row of {count} documents, {2**18 / count:,.0f} tokens each on average" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["lognormal:lots", "lognormal:8K,x", "nowhere.json", "{folder}"])
def test_documents_that_are_not_understood_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text('["a"]')
    with pytest.raises(UserMistake, match="lognormal:MEAN,SIGMA .* or a JSON file with a list of lengths is expected"):
        corpus_of(text.format(folder=tmp_path))
    with pytest.raises(UserMistake, match="no list of whole numbers"):
        corpus_of(str(tmp_path / "words.json"))
