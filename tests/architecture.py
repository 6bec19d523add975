"""The rules of the house as functions from one parsed module to the list of what breaks them.

A rule sees code only: comments and docstrings may name anything. `test_architecture.py` runs every rule over
the package and over bad sources that each rule must flag.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

PACKAGE = "hf_fpdt"

# A module imports from strictly lower ranks, so modules of one rank do not know each other.
RANKS = MappingProxyType(
    {
        **dict.fromkeys(("config", "ambient", "by_layer", "layer_state", "trace_intervals", "versions"), 0),
        **dict.fromkeys(("layout", "keep", "disk", "trace", "arguments", "support", "shrink"), 1),
        **dict.fromkeys(("shelves", "trace_file", "trace_picture"), 2),
        **dict.fromkeys(("kernels", "offload", "pinned", "comms", "reference", "planner", "memory"), 3),
        **dict.fromkeys(("liger", "optimizers"), 3),
        **dict.fromkeys(("streamed_kv", "entries", "gradients", "rates", "cross_entropy_kernel", "progress"), 4),
        **dict.fromkeys(("kv_store", "budget", "cross_entropy", "rates_file", "work", "exchange"), 5),
        **dict.fromkeys(("attention", "checkpoint_store", "fit", "measure"), 6),
        **dict.fromkeys(("run", "shapes", "plan_curves"), 7),
        **dict.fromkeys(("layer", "loss", "trial", "plan_picture", "plan_tables"), 8),
        "patch": 9,
        **dict.fromkeys(("linear", "interface"), 10),
        "fused": 11,
        "layers": 12,
        "head": 13,
        "model": 14,
        **dict.fromkeys(("data", "plan_report", "check", "speed"), 15),
        **dict.fromkeys(("loaders", "recording", "bench.__init__", "bench.job", "bench.figures", "bench.longest"), 16),
        **dict.fromkeys(("bench.lifeline", "bench.world", "bench.chunked_loss", "bench.report"), 16),
        **dict.fromkeys(("accelerate", "trainer", "bench.models", "bench.children", "bench.stack"), 17),
        **dict.fromkeys(("bench.spread", "bench.predicted", "bench.ceiling", "bench.driver"), 18),
        **dict.fromkeys(("bench.peers", "bench.parity", "bench.measure"), 19),
        **dict.fromkeys(("bench.ring", "bench.alst_sp"), 20),
        "bench.catalogue": 21,
        **dict.fromkeys(("bench.child", "bench.options", "cli_options"), 22),
        **dict.fromkeys(("cli_bench", "cli_check", "cli_completion", "cli_plan", "cli_trace"), 23),
        **dict.fromkeys(("commands.__init__", "commands.parser"), 23),
        **dict.fromkeys((f"commands.finetune.{name}" for name in ("__init__", "skipped", "rope", "base_model")), 23),
        **dict.fromkeys((f"commands.finetune.{name}" for name in ("windows", "steps", "card")), 23),
        **dict.fromkeys(("commands.finetune.trainer_options", "commands.eval.__init__", "commands.eval.curves"), 23),
        **dict.fromkeys(("commands.finetune.tables", "commands.finetune.options"), 24),
        **dict.fromkeys(("commands.eval.loss_by_position", "commands.eval.figure"), 24),
        **dict.fromkeys(("commands.finetune.sources", "commands.finetune.output", "commands.eval.options"), 25),
        **dict.fromkeys(("commands.finetune.data", "commands.eval.measure"), 26),
        "commands.finetune.facts": 27,
        "commands.finetune.run": 28,
        **dict.fromkeys(("commands.finetune.command", "commands.eval.command"), 29),
        "cli": 30,
        "commands.finetune.__main__": 31,
        "__init__": 32,
    }
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_NESTING = 4
MAX_MEDIAN_FUNCTION_LINES = 16
MAX_UNDOCUMENTED_LINES = 8

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
MUTABLE_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = frozenset({"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"})
LOOKING_CALLS = frozenset({"isinstance", "hasattr", "len", "all", "any", "set", "sorted", "min", "max", "sum"})
FROZEN_CALLS = frozenset({"MappingProxyType", "tuple", "frozenset"})
HOT_PATH = frozenset(
    ["attention", "layer", "run", "offload", "pinned", "kernels", "loss", "streamed_kv", "kv_store", "entries"]
    + ["checkpoint_store", "linear", "fused", "liger", "cross_entropy", "cross_entropy_kernel"]
)
HF_ROOMS = frozenset(
    ["model", "layers", "head", "fused", "interface", "shapes", "loss", "trainer", "accelerate", "data", "loaders"]
    + ["plan_report", "cli_options", "bench.models", "commands.parser", "commands.eval.measure"]
    + [f"commands.finetune.{name}" for name in ("base_model", "options", "output", "rope", "run", "steps")]
    + ["commands.finetune.trainer_options"]
)
COMMANDS = frozenset(
    ["cli", "cli_bench", "cli_check", "cli_options", "cli_plan", "cli_trace"]
    + ["commands.eval.command", "commands.finetune.facts", "commands.finetune.steps"]
)
# The tokenizers library raises the class Exception itself: caught there, and let go on where it is any other.
PLAIN_EXCEPTIONS = frozenset({("commands.finetune.base_model", "_load_tokenizer")})
AUTOGRAD_STATICS = frozenset({"forward", "backward"})


@dataclass(frozen=True)
class Module:
    """One source file: its name inside the package (`layer`, `bench.job`, `__init__`), its text and its tree."""

    name: str
    source: str
    tree: ast.Module

    @classmethod
    def parse(cls, name: str, source: str) -> Module:
        return cls(name, source, ast.parse(source))

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS))


Problems = Iterator[str]
Rule = Callable[[Module], Problems]


def read_package(root: Path) -> list[Module]:
    """All modules of the package; one in a subfolder is `folder.file`, the subfolder itself `folder.__init__`."""
    folder = root / PACKAGE
    return [
        Module.parse(".".join(path.relative_to(folder).with_suffix("").parts), path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    ]


# Imports -------------------------------------------------------------------------------------------


def import_order(module: Module) -> Problems:
    """Imports point one way: from a module to strictly earlier ranks."""
    if module.name not in RANKS:
        yield f"{module.name}: give it a rank in tests/architecture.py"
        return
    for line, name in _own_imports(module):
        if name not in RANKS:
            yield f"{module.name}:{line}: imports {name}, which is no module with a rank"
        elif RANKS[name] >= RANKS[module.name]:
            yield f"{module.name}:{line}: must not import {name} (rank {RANKS[name]})"


def _own_imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every module of the package that the module imports."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                folders = [PACKAGE, *module.name.split(".")[:-1]]
                parts = [*folders[: len(folders) + 1 - node.level], *parts]
            if parts and parts[0] == PACKAGE:
                yield from ((node.lineno, _imported([*parts[1:], alias.name])) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, *rest = alias.name.split(".")
                if head == PACKAGE:
                    yield node.lineno, _imported(rest) if rest else "__init__"


def _imported(parts: list[str]) -> str:
    """The module that `parts` name, or a name in: the longest that has a rank, else the first part."""
    names = (".".join(parts[:length]) for length in (3, 2, 1))
    return next((name for name in names if name in RANKS), parts[0])


# Forbidden words -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A pattern over what code mentions (see `_mentions`) and the modules where it may stand."""

    pattern: str
    allowed: frozenset[str] | None = None
    forbidden: frozenset[str] = frozenset()

    def is_broken_by(self, module: str, mention: str) -> bool:
        banned = module in self.forbidden if self.allowed is None else module not in self.allowed
        return banned and re.search(self.pattern, mention) is not None


WORDS = (
    Word(r"\bStream\(|(?<!threading\.)\bEvent\(", frozenset({"offload"})),
    Word(r"\b(wait_event|wait_stream|record_stream|pin_memory|non_blocking)\b", frozenset({"offload"})),
    Word(r"\btorch\.distributed\b", frozenset({"comms", "accelerate", "trainer", "bench.world"})),
    Word(r"\b(all_to_all|all_reduce)", frozenset({"comms", "bench.world"})),
    Word(
        r"\bflash_attn|\baten\._\w*attention|\b_scaled_dot_product_|\b_flash_attention_",
        frozenset({"kernels"}),
    ),
    Word(r"^import transformers\b", HF_ROOMS),
    Word(r"\bsynchronize\(|\.item\(|\bbarrier\(", forbidden=HOT_PATH),
    Word(r"^(builtins\.)?print\(", COMMANDS),
)


def forbidden_words(module: Module) -> Problems:
    """Streams in offload, collectives in comms, kernels in kernels, no waiting on the hot path, …"""
    found = {
        (line, mention)
        for line, mention in _mentions(module.tree)
        for word in WORDS
        if word.is_broken_by(module.name, mention)
    }
    for line, mention in sorted(found):
        yield f"{module.name}:{line}: '{mention}' does not belong here"


def _mentions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of what code names: `a.b`, a call as `a.b(`, a keyword, an import as `import a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"import {node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, _dotted(node)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Call):
            yield node.lineno, _dotted(node.func) + "("
            yield from _looked_up(node)


def _looked_up(call: ast.Call) -> Iterator[tuple[int, str]]:
    """What a call reaches by a string: import_module("a.b"), getattr(a.b, "c")."""
    function = _dotted(call.func).rpartition(".")[2]
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if function in ("import_module", "__import__", "find_spec"):
        yield from ((call.lineno, f"import {text}") for text in texts)
    elif function in ("getattr", "hasattr") and call.args:
        yield from ((call.lineno, f"{_dotted(call.args[0])}.{text}") for text in texts)


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes; what is no name becomes `?`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


# State and errors ----------------------------------------------------------------------------------


def module_state(module: Module) -> Problems:
    """No mutable value at module level, and no `global`. A constant table is ALL_CAPS and read-only."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{module.name}:{node.lineno}: `global {', '.join(node.names)}`"
    for line, name, value in _module_assignments(module.tree.body):
        if name == "__all__":
            continue
        if _is_mutable(value):
            yield f"{module.name}:{line}: {name} is mutable; use a tuple, frozenset or MappingProxyType"
        elif _called(value) in FROZEN_CALLS and not re.fullmatch(r"_*[A-Z][A-Z0-9_]*", name):
            yield f"{module.name}:{line}: constant {name} must be ALL_CAPS"


def _module_assignments(body: list[ast.stmt]) -> Iterator[tuple[int, str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((node.lineno, ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.lineno, ast.unparse(node.target), node.value
        elif isinstance(node, BLOCKS):
            for field in ("body", "orelse", "finalbody"):
                yield from _module_assignments(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _module_assignments(handler.body)


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return any(_is_mutable(element) for element in value.elts)
    return isinstance(value, MUTABLE_LITERALS) or _called(value) in MUTABLE_CALLS


def _called(value: ast.expr) -> str:
    """The last name of the function that `value` calls, or nothing."""
    return _dotted(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""


def broad_except(module: Module) -> Problems:
    """An error is caught by its own type, or not at all."""
    functions = (f for f in module.functions() if (module.name, f.name) in PLAIN_EXCEPTIONS)
    exempt = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(module.tree):
        if node in exempt:
            continue
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{module.name}:{node.lineno}: bare except"
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and _called(node) == "suppress":
            caught = node.args
        if any(_dotted(error) in ("Exception", "BaseException") for error in caught):
            yield f"{module.name}:{getattr(node, 'lineno', 0)}: catches every Exception"


def asserts(module: Module) -> Problems:
    """An assert only looks: `python -O` leaves it out, and what it calls with it."""
    for node in ast.walk(module.tree):
        for inner in ast.walk(node.test) if isinstance(node, ast.Assert) else ():
            if isinstance(inner, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                yield f"{module.name}:{inner.lineno}: an assert does more than look"
            elif isinstance(inner, ast.Call) and _dotted(inner.func) not in LOOKING_CALLS:
                yield f"{module.name}:{inner.lineno}: an assert calls {_dotted(inner.func)}(); call it before"


# Budgets -------------------------------------------------------------------------------------------


def budgets(module: Module) -> Problems:
    """Lines a file, lines a function, parameters, nesting."""
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{module.name}: {lines} lines, at most {MAX_FILE_LINES}"
    exempt = set(_free_signatures(module))
    for function in module.functions():
        where = f"{module.name}:{function.lineno}: {function.name}"
        if (length := function_lines(function)) > MAX_FUNCTION_LINES:
            yield f"{where} has {length} lines, at most {MAX_FUNCTION_LINES}"
        if (count := _parameters(function)) > MAX_PARAMETERS and function not in exempt:
            yield f"{where} has {count} parameters, at most {MAX_PARAMETERS}"
        if (depth := _nesting(function.body)) > MAX_NESTING:
            yield f"{where} nests {depth} blocks, at most {MAX_NESTING}"


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last, docstring included, decorators not."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    counted = [arg for i, arg in enumerate(named) if i or arg.arg not in ("self", "cls", "ctx")]
    return len(counted) + (args.vararg is not None) + (args.kwarg is not None)


def _free_signatures(module: Module) -> Iterator[ast.stmt]:
    """Functions whose parameters others dictate: autograd.Function's, transformers' attention function."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and any(_dotted(base).endswith("Function") for base in node.bases):
            yield from (f for f in node.body if isinstance(f, FUNCTIONS) and f.name in AUTOGRAD_STATICS)
        elif isinstance(node, FUNCTIONS) and (module.name, node.name) == ("interface", "fpdt_attention"):
            yield node


def _nesting(body: list[ast.stmt]) -> int:
    """Depth of blocks in `body`; a nested function starts again at zero, for it is measured on its own."""
    return max((1 + _inner_nesting(node) for node in body if isinstance(node, BLOCKS)), default=0)


def _inner_nesting(block: ast.stmt) -> int:
    bodies = [getattr(block, "body", []), getattr(block, "finalbody", [])]
    bodies += [part.body for field in ("handlers", "cases") for part in getattr(block, field, [])]
    orelse = getattr(block, "orelse", [])
    # `elif` is an `if` in the else branch, at the same column, and no deeper to a reader.
    if isinstance(block, ast.If) and len(orelse) == 1 and isinstance(orelse[0], ast.If):
        chained = orelse[0].col_offset == block.col_offset
        return max(_inner_nesting(orelse[0]) if chained else _nesting(orelse), *map(_nesting, bodies))
    return max(map(_nesting, [*bodies, orelse]))


def docstrings(module: Module) -> Problems:
    """Modules, and public functions, classes and methods of more than a few lines, say what they are for."""
    if ast.get_docstring(module.tree) is None:
        yield f"{module.name}: no module docstring"
    for node in _public(module.tree.body):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_UNDOCUMENTED_LINES and ast.get_docstring(node) is None:
            yield f"{module.name}:{node.lineno}: {node.name} has {lines} lines and no docstring"


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


RULES: tuple[Rule, ...] = (import_order, forbidden_words, module_state, broad_except, asserts, budgets, docstrings)
