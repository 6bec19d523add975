"""The package keeps the rules of the house, and each rule flags a source that breaks it."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

from tests.helpers import architecture, support
from tests.helpers.architecture import (
    MAX_MEDIAN_FUNCTION_LINES,
    ROOMS,
    RULES,
    Module,
    Rule,
    asserts,
    broad_except,
    budgets,
    circles,
    closed_doors,
    docstrings,
    forbidden_words,
    function_lines,
    messages,
    module_state,
    read_package,
    rooms,
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


def test_the_package_has_no_circles_and_its_doors_hand_out_what_is_taken() -> None:
    assert not list(circles(PACKAGE))
    assert not list(closed_doors(PACKAGE))


def test_the_label_that_counts_for_nothing_is_written_once() -> None:
    written = [
        m.name
        for m in PACKAGE
        for node in ast.walk(m.tree)
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100"
    ]
    assert written == ["labels"]


def test_every_room_is_there_with_a_door_that_lists_its_files() -> None:
    for room in ROOMS:
        door = next(module for module in PACKAGE if module.name == f"{room}.__init__")
        said = ast.get_docstring(door.tree) or ""
        for module in PACKAGE:
            if module.name.startswith(f"{room}.") and module.name.count(".") == 1 and module is not door:
                name = module.name.split(".")[1]
                assert room == "commands" or re.search(rf"^ +{name}\b", said, re.MULTILINE), module.name


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layout.chunks", "from ..plan import Budgets"),
        ("plan.tiers", "def f():\n    from ..memory import KVStore"),
        ("plan.tiers", "from hf_fpdt.memory import KVStore"),
        ("plan.tiers", "from hf_fpdt import memory"),
        ("memory.kv", "from ..engine.layer import run_layer"),
        ("engine.layer", "from ..memory.kv import KVStore"),
        ("engine.layer", "import hf_fpdt.memory.kv"),
        ("model.apply", "from hf_fpdt import FPDTPlugin"),
        ("model.apply", "import hf_fpdt"),
        ("units", "from .plan import Budgets"),
        ("surprise.file", ""),
    ],
)
def test_rooms_flags(name: str, source: str) -> None:
    assert problems(rooms, name, source)


def test_rooms_allows_doors_and_what_is_beside() -> None:
    assert not problems(rooms, "engine.layer", "from ..memory import KVStore\nfrom .calls import Call\nimport torch")
    assert not problems(rooms, "attention.kernels.cpu", "from .contract import Kernel\nfrom ...layout import RowShape")
    assert not problems(rooms, "commands.bench.job", "import hf_fpdt.model\nimport hf_fpdt_extra\nimport torch")
    assert not problems(rooms, "__init__", "from .engine import attend_whole\nfrom .config import FPDTPlugin")


def test_circles_and_closed_doors_are_found() -> None:
    made = [
        Module.parse("a.__init__", "from .one import x\n__all__ = ['x']"),
        Module.parse("a.one", "from .two import y"),
        Module.parse("a.two", "def f():\n    from . import one"),
        Module.parse("b.__init__", "from ..a import x, z"),
    ]
    assert list(circles(made)) == ["a.one -> a.two -> a.one"]
    assert list(closed_doors(made)) == ["b.__init__:1: a does not hand out z"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine.layer", "s = torch.cuda.Stream()"),
        ("attention.online", "torch.cuda.Event(enable_timing=True)"),
        ("parallel.group", "stream.wait_event(e)"),
        ("engine.layer", "x.record_stream(s)"),
        ("engine.loss", "x.to(device, non_blocking=True)"),
        ("model.apply", "torch.empty(3, pin_memory=True)"),
        ("engine.layer", "import torch.distributed as dist"),
        ("engine.loss", "from torch import distributed"),
        ("memory.transfers", "torch.distributed.get_rank()"),
        ("training.trainer", "dist.all_reduce(x)"),
        ("training.accelerator", "from torch.distributed import all_to_all_single"),
        ("attention.online", "from flash_attn.cute.interface import _flash_attn_fwd"),
        ("forecast.collectives", "importlib.import_module('flash_attn')"),
        ("model.attention_function", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)"),
        ("attention.reference", "getattr(torch.ops.aten, '_flash_attention_forward')"),
        ("attention.reference", "aten = torch.ops.aten\naten._efficient_attention_forward()"),
        ("plan.sizes", "from torch import Tensor"),
        ("engine.layer", "from transformers.utils import logging"),
        ("config", "import transformers"),
        ("attention.online", "torch.cuda.synchronize()"),
        ("memory.transfers", "torch.cuda.current_stream().synchronize()"),
        ("engine.loss", "n = count().item()"),
        ("attention.kernels.cpu", "dist.barrier()"),
        ("forecast.collectives", "print('hello')"),
    ],
)
def test_forbidden_words_flags(name: str, source: str) -> None:
    assert problems(forbidden_words, name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("memory.transfers", "s = torch.cuda.Stream()\nx.to(d, non_blocking=True)\nx.record_stream(s)"),
        ("parallel.group", "import torch.distributed as dist\ndist.all_reduce(x)\ndist.all_to_all_single(y, x)"),
        ("training.trainer", "from torch.distributed.device_mesh import init_device_mesh"),
        ("attention.kernels.cpu", "torch.ops.aten._flash_attention_forward(q, k, v)"),
        ("model.apply", "import transformers"),
        ("commands.main", "print(loss.item())\ntorch.cuda.synchronize()"),
        ("engine.layer", '"""torch.distributed, print(x), x.item()."""\n# torch.cuda.Stream()'),
        ("model.attention_function", "raise ValueError('flash_attn is not used: print( nothing')"),
        ("attention.online", "for k, v in store.stream(order):\n    seq_to_heads(k.items(), fingerprint(v))"),
        ("training.loaders", "done = threading.Event()\nargs.dataloader_pin_memory"),
        ("attention.online", "F.scaled_dot_product_attention(q, k, v)"),
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
    "source",
    [
        "raise ValueError('fpdt: two are too many')",
        "raise ValueError(f'{name} is one too many')",
        "raise ValueError('{} is one too many'.format(name))",
        "raise OSError(errno.EIO, f'the file {name} ends early')",
        "logger.warning('two are too many')",
    ],
)
def test_messages_flag_what_does_not_say_who_speaks(source: str) -> None:
    assert problems(messages, "memory.kv", source)
    assert problems(messages, "memory.disk", f"def walk():\n    {source}")
    assert not problems(messages, "memory.disk", f"def _move():\n    {source}"), "a reason that another goes round"
    assert not problems(messages, "commands.plan.command", source)


def test_messages_may_name_the_package_or_the_call() -> None:
    good = "raise ValueError(f'hf_fpdt: {a}')\nraise ValueError(f'FPDTPlugin({a}): no')\nraise\nraise found(3)"
    assert not problems(messages, "config", good + "\nlogger.info('hf_fpdt: %s', 'x')\nprint('x')\nraise Stop")


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
    assert not problems(budgets, "model.attention_function", f"def fpdt_attention{many}: ...")
    assert problems(budgets, "layer", f"def fpdt_attention{many}: ...")
    assert not problems(budgets, "layer", f"@triton.jit\ndef kernel{many}: ...")
    assert problems(budgets, "layer", f"@cache\ndef kernel{many}: ...")


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
