"""The package keeps the rules of the house, and each rule flags a source that breaks it."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from tests import architecture, support
from tests.architecture import (
    MAX_MEDIAN_FUNCTION_LINES,
    RANKS,
    RULES,
    Module,
    Rule,
    asserts,
    broad_except,
    budgets,
    docstrings,
    forbidden_words,
    function_lines,
    import_order,
    module_state,
    read_package,
)

ROOT = Path(__file__).parent.parent
PACKAGE = read_package(ROOT)


def problems(rule: Rule, name: str, source: str) -> list[str]:
    return list(rule(Module.parse(name, source)))


def function(lines: int, head: str = "def f():") -> str:
    """A function of that many lines."""
    return head + "\n" + "    pass\n" * (lines - 1)


def nested(depth: int) -> str:
    """A function with `depth` blocks one inside the other."""
    return "def f():\n" + "".join(f"{'    ' * (i + 1)}if x:\n" for i in range(depth)) + "    " * (depth + 1) + "pass"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Rule) -> None:
    found = [problem for module in PACKAGE for problem in rule(module)]
    assert not found, "\n".join(["", *found])


def test_median_function_is_short() -> None:
    lengths = [function_lines(function) for module in PACKAGE for function in module.functions()]
    assert not lengths or statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


def test_contributing_has_the_rules_that_hold() -> None:
    """Each by its name, with its numbers; files, tables and helpers that it names are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert re.findall(r"^- `(\w+)`:", text, re.MULTILINE) == [rule.__name__ for rule in RULES]
    for said in (
        f"at most {architecture.MAX_FILE_LINES} lines a file; {architecture.MAX_FUNCTION_LINES} lines, "
        f"{architecture.MAX_PARAMETERS} parameters and {architecture.MAX_NESTING} nested blocks a function",
        f"{MAX_MEDIAN_FUNCTION_LINES} lines the median one",
        f"of more than {architecture.MAX_UNDOCUMENTED_LINES} lines",
    ):
        assert said in " ".join(text.split())
    for path in re.findall(r"`([\w./]+\.(?:py|sh|txt|md))`", text):
        assert (ROOT / path).exists(), path
    names = {*vars(architecture), *vars(support)}
    assert {*re.findall(r"`([A-Z_]+)`", text), *re.findall(r"`(\w+)\(", text)} <= names


def test_the_package_is_found() -> None:
    assert any(module.name == "__init__" for module in PACKAGE)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layout", "from hf_fpdt.kernels import choose"),
        ("layout", "def f():\n    from .offload import KVStore"),
        ("kernels", "from hf_fpdt.offload import KVStore"),
        ("kernels", "from hf_fpdt import offload"),
        ("planner", "import hf_fpdt.kernels"),
        ("by_layer", "from . import config"),
        ("trainer", "from hf_fpdt.accelerate import FPDTAccelerator"),
        ("model", "from hf_fpdt import FPDTPlugin"),
        ("model", "import hf_fpdt"),
        ("attention", "from hf_fpdt.families.llama import x"),
    ],
)
def test_import_order_flags(name: str, source: str) -> None:
    assert problems(import_order, name, source)


def test_import_order_allows_what_points_left() -> None:
    everything = "\n".join(f"from .{name} import x" for name in RANKS if not name.endswith("__init__"))
    assert not problems(import_order, "planner", "from hf_fpdt.config import x\nfrom . import layout")
    assert not problems(import_order, "cli", "import hf_fpdt.model\nimport hf_fpdt_extra\nimport torch")
    assert not problems(import_order, "__init__", everything)


def test_import_order_reaches_into_subfolders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "RANKS", {**RANKS, "sub.low": 18, "sub.high": 19})
    assert not problems(import_order, "sub.high", "from .low import x\nfrom . import low\nfrom ..model import y")
    assert not problems(import_order, "cli", "from .sub.high import x\nfrom .sub import high")
    for source in ("from .high import x", "from . import high", "from hf_fpdt.sub import high", "from ..cli import x"):
        assert problems(import_order, "sub.low", source), source
    assert problems(import_order, "model", "from .sub.low import x")


def test_import_order_reaches_into_folders_of_folders() -> None:
    name = "commands.finetune.rope"
    assert not problems(import_order, name, "from ...cli_options import x")
    assert problems(import_order, name, "from .run import x") and problems(
        import_order, name, "from ..eval import measure"
    )


def test_import_order_asks_for_the_rank_of_a_new_module() -> None:
    assert "give it a rank" in problems(import_order, "surprise", "")[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layer", "s = torch.cuda.Stream()"),
        ("attention", "torch.cuda.Event(enable_timing=True)"),
        ("comms", "stream.wait_event(e)"),
        ("layer", "x.record_stream(s)"),
        ("loss", "x.to(device, non_blocking=True)"),
        ("model", "torch.empty(3, pin_memory=True)"),
        ("layer", "import torch.distributed as dist"),
        ("loss", "from torch import distributed"),
        ("offload", "torch.distributed.get_rank()"),
        ("trainer", "dist.all_reduce(x)"),
        ("accelerate", "from torch.distributed import all_to_all_single"),
        ("attention", "from flash_attn.cute.interface import _flash_attn_fwd"),
        ("planner", "importlib.import_module('flash_attn')"),
        ("interface", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)"),
        ("reference", "getattr(torch.ops.aten, '_flash_attention_forward')"),
        ("reference", "aten = torch.ops.aten\naten._efficient_attention_forward()"),
        ("layer", "from transformers.utils import logging"),
        ("config", "import transformers"),
        ("attention", "torch.cuda.synchronize()"),
        ("offload", "torch.cuda.current_stream().synchronize()"),
        ("loss", "n = count().item()"),
        ("kernels", "dist.barrier()"),
        ("planner", "print('hello')"),
    ],
)
def test_forbidden_words_flags(name: str, source: str) -> None:
    assert problems(forbidden_words, name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("offload", "s = torch.cuda.Stream()\nx.to(d, non_blocking=True)\nx.record_stream(s)"),
        ("comms", "import torch.distributed as dist\ndist.all_reduce(x)\ndist.all_to_all_single(y, x)"),
        ("trainer", "from torch.distributed.device_mesh import init_device_mesh"),
        ("kernels", "torch.ops.aten._flash_attention_forward(q, k, v)"),
        ("model", "import transformers"),
        ("cli", "print(loss.item())\ntorch.cuda.synchronize()"),
        ("layer", '"""torch.distributed, print(x), x.item()."""\n# torch.cuda.Stream()'),
        ("interface", "raise ValueError('flash_attn is not used: print( nothing')"),
        ("attention", "for k, v in store.stream(order):\n    seq_to_heads(k.items(), fingerprint(v))"),
        ("data", "done = threading.Event()\nargs.dataloader_pin_memory"),
        ("attention", "F.scaled_dot_product_attention(q, k, v)"),
    ],
)
def test_forbidden_words_allows(name: str, source: str) -> None:
    assert not problems(forbidden_words, name, source)


@pytest.mark.parametrize(
    "source",
    [
        "cache = {}",
        "CACHE: dict[str, int] = {}",
        "seen = set()",
        "TABLE = [i for i in range(3)]",
        "by_name = collections.defaultdict(list)",
        "a, b = [], 0",
        "try:\n    x = []\nexcept ImportError:\n    pass",
        "try:\n    pass\nexcept ImportError:\n    x = []",
        "table = MappingProxyType({'a': 1})",
        "count = 0\ndef f():\n    global count\n    count += 1",
    ],
)
def test_module_state_flags(source: str) -> None:
    assert problems(module_state, "layout", source)


def test_module_state_allows_read_only_constants() -> None:
    good = "__all__ = ['a']\nTABLE = MappingProxyType({'a': 1})\n_NAMES = frozenset({1})\nPAIR = (1, 2)\n"
    inside = "def f():\n    x = []\nclass A:\n    y: list = field(default_factory=list)\n"
    assert not problems(module_state, "layout", good + inside + "call = ContextVar('call', default=None)")


@pytest.mark.parametrize("catch", ["except:", "except Exception:", "except (OSError, BaseException) as e:"])
def test_broad_except_flags(catch: str) -> None:
    assert problems(broad_except, "layout", f"try:\n    pass\n{catch}\n    pass")
    assert problems(broad_except, "layout", "with suppress(Exception):\n    pass")
    assert not problems(broad_except, "layout", "try:\n    pass\nexcept (OSError, KeyError):\n    pass")
    plain = "def {}():\n    try:\n        pass\n    except Exception as error:\n        raise"
    assert not problems(broad_except, "commands.finetune.base_model", plain.format("_load_tokenizer"))
    assert problems(broad_except, "commands.finetune.base_model", plain.format("load_weights"))


@pytest.mark.parametrize(
    "test", ["all(step.play())", "x.pop() is None", "(y := f)", "next(rows) == 1", "all(x.add(y) for y in z)"]
)
def test_asserts_flag_what_does_more_than_look(test: str) -> None:
    assert problems(asserts, "layout", f"def f():\n    assert {test}, message()")


def test_asserts_may_look() -> None:
    good = "assert a is not None\nassert all(fits) and len(a) == b[c].d\nassert isinstance(a, B), f'{a()}'"
    assert not problems(asserts, "layout", good)


def test_asserts_of_scripts_look_alone() -> None:
    scripts = sorted((ROOT / "scripts").rglob("*.py"))
    found = [problem for path in scripts for problem in asserts(Module.parse(path.name, path.read_text()))]
    assert scripts and not found, "\n".join(["", *found])


def test_budgets_flag_length() -> None:
    assert problems(budgets, "layout", "x = 1\n" * 401) and not problems(budgets, "layout", "x = 1\n" * 400)
    assert problems(budgets, "layout", function(61)) and not problems(budgets, "layout", function(60))


@pytest.mark.parametrize(
    ("signature", "flagged"),
    [
        ("a, b, c, d, e, f, g, h", False),
        ("a, b, c, d, e, f, g, h, i", True),
        ("self, a, b, c, d, *, e, f, g, h", False),
        ("a, b, c, d, *args, e, f, g, **kwargs", True),
    ],
)
def test_budgets_flag_parameters(signature: str, flagged: bool) -> None:
    assert bool(problems(budgets, "layout", f"def f({signature}): ...")) == flagged


def test_budgets_exempt_signatures_that_others_dictate() -> None:
    many = "(ctx, a, b, c, d, e, f, g, h, i)"
    autograd = f"class A({{base}}):\n    @staticmethod\n    def forward{many}: ..."
    assert not problems(budgets, "layer", autograd.format(base="torch.autograd.Function"))
    assert problems(budgets, "layer", autograd.format(base="nn.Module"))
    assert not problems(budgets, "interface", f"def fpdt_attention{many}: ...")
    assert problems(budgets, "layer", f"def fpdt_attention{many}: ...")


def test_budgets_flag_nesting() -> None:
    assert problems(budgets, "layout", nested(5)) and not problems(budgets, "layout", nested(4))
    chain = "def f():\n    if a:\n        pass\n" + "    elif b:\n        pass\n" * 6
    assert not problems(budgets, "layout", chain)
    loops = "def f():\n    for a in b:\n        try: pass\n        except E:\n            with c:\n"
    deep = loops + " " * 16 + "match d:\n" + " " * 20 + "case 1:\n" + " " * 24 + "while e: pass"
    assert problems(budgets, "layout", deep)


def test_docstrings_flag() -> None:
    head = '"""Room."""\n'
    assert problems(docstrings, "layout", "x = 1")
    assert problems(docstrings, "layout", head + function(9))
    assert not problems(docstrings, "layout", head + function(8))
    assert not problems(docstrings, "layout", head + function(9, "def _f():"))
    method = "class A:\n    'doc'\n" + "\n".join("    " + line for line in function(9).splitlines())
    assert problems(docstrings, "layout", head + method)
    assert not problems(docstrings, "layout", head + method.replace("class A", "class _A"))
