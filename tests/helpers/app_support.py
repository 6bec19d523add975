"""For the tests of scripts/ and examples/: the folders, subprocesses, a tiny checkpoint and texts to train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import run_or_tell

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
# The scripts import one another by bare name, as when they are run.
sys.path += [str(folder) for folder in (SCRIPTS, SCRIPTS / "bench", SCRIPTS / "docs") if str(folder) not in sys.path]


def run_python(*arguments: str | Path, package: Path = ROOT, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python ...` in a folder, with the package importable from another, and two threads."""
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, *map(str, arguments)]
    return run_or_tell(command, environment=environment, folder=folder)


def stories(count: int, lines: int = 40) -> list[str]:
    """Different plain texts; each has a name that returns through all of it."""
    return ["\n".join(f"line {line} of story number {story}" for line in range(lines)) for story in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document a line, with names."""
    rows = [json.dumps({"name": f"{path.stem}{number}", "text": text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_tiny_checkpoint(folder: Path) -> Path:
    """A tokenizer and an untrained Llama of a few thousand weights, saved as an ordinary checkpoint."""
    import torch
    from quickstart_model import Recipe, new_model, train_tokenizer

    torch.manual_seed(0)
    recipe = Recipe(vocab=300, hidden=16, layers=2, heads=2, kv_heads=1, mlp_hidden=32)
    tokenizer = train_tokenizer(stories(4), recipe.vocab)
    new_model(recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
