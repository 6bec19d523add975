"""An adapter whose rotary parameters are forgotten says so; `--merge` writes a model that needs none of this."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_fpdt import apply_fpdt
from hf_fpdt.commands.main import main
from tests.helpers.app_support import stories, write_jsonl, write_tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")


def command(base: Path, output: Path, *words: str) -> list[str]:
    data = write_jsonl(output.parent / "data.jsonl", stories(6, lines=80))
    sizes = "--eval_fraction 0.3 --max_length 1K --max_steps 2 --warmup_steps 0 --lr 1e-2 --lora_r 4 --use_cpu"
    return ["finetune", *f"--model {base} --data {data} --output {output} {sizes}".split(), *words]


@pytest.fixture(scope="module")
def output(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "run"
    assert main(command(base, folder, "--rope_scaling", "yarn", "--merge")) == 0
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(900)[None] % 300).logits


def on_its_base(base: Path, output: Path) -> PeftModel:
    config = AutoConfig.from_pretrained(output)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, config=config), output)


def test_the_merged_folder_is_the_model_with_its_adapter(base: Path, output: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert merged.config.rope_parameters["rope_type"] == "yarn" and not hasattr(merged, "peft_config")
    assert len(AutoTokenizer.from_pretrained(output / "merged")) == 300
    truth = logits(on_its_base(base, output))
    torch.testing.assert_close(logits(merged), truth, rtol=0, atol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(stock) - truth).abs().max() > 1e-2, "a merge of nothing would pass too"


def test_the_card_recommends_the_merged_folder_first(output: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2 and f'folder = "{output}/merged"' in blocks[0] and "PeftModel" in blocks[1]
    for block in blocks:
        exec(block, {})


def warnings_of(model: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_fpdt"):
        apply_fpdt(model).remove()
    return [record.getMessage() for record in caplog.records if "rotary" in record.getMessage()]


def test_an_adapter_on_a_base_of_other_rotary_parameters_is_warned_of(
    base: Path, output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    (said,) = warnings_of(plain, caplog)
    assert "'rope_type': 'yarn'" in said and "'rope_type': 'default'" in said
    assert f'from_pretrained("{base}", config=AutoConfig' in said
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as of the hub, by the adapter's name alone
        shutil.copy(output / name, tmp_path)
    assert len(warnings_of(AutoModelForCausalLM.from_pretrained(tmp_path), caplog)) == 1


def test_an_adapter_on_its_own_base_is_not(base: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_of(on_its_base(base, output), caplog)
    assert not warnings_of(AutoModelForCausalLM.from_pretrained(output / "merged"), caplog)
    others = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    assert not warnings_of(others, caplog), "nothing is known of an adapter made without this package"


def test_checkpoints_know_it_too(output: Path) -> None:
    for folder in (output, output / "checkpoint-2"):
        mapping = json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
        assert mapping["rope_parameters"]["factor"] == 2.0 and mapping["base_model_class"] == "LlamaForCausalLM"


def test_a_finished_run_is_merged_later(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(command(base, output, "--rope_scaling", "yarn")) == 0
    assert main(["finetune", "--resume", "--output", str(output), "--merge"]) == 0
    assert "wrote the model with the adapter in it" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    torch.testing.assert_close(logits(merged), logits(on_its_base(base, output)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--full"], ["--merge", "--full"]),
        (["--fsdp", "full_shard"], ["--merge", "FSDP", "merge_and_unload"]),
    ],
)
def test_what_cannot_be_merged_is_refused_first(
    words: list[str], said: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, tmp_path / "run", "--merge", *words)) == 2
    printed = capsys.readouterr()
    assert all(word in printed.err for word in said), printed.err
    assert "reading" not in printed.out


def test_an_adapter_of_a_head_that_is_the_embedding_too_is_not_merged(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = shutil.copytree(base, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert main(command(tied, tmp_path / "run", "--merge", "--lora_target_modules", "q_proj,lm_head")) == 2
    assert "head and embedding are one tensor" in capsys.readouterr().err
