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

# Who may import whom; a room knows the doors of these others, and of single files these.
ROOMS = MappingProxyType(
    {
        "layout": frozenset(),
        "plan": frozenset({"layout", "config", "units"}),
        "forecast": frozenset({"plan", "layout", "units"}),
        "attention": frozenset({"layout", "numerics"}),
        "parallel": frozenset({"layout", "config", "labels"}),
        "memory": frozenset({"plan", "parallel", "layout", "config", "numerics", "units"}),
        "engine": frozenset({"memory", "attention", "parallel", "plan", "layout", "labels", "numerics"}),
        "model": frozenset(
            {"engine", "memory", "attention", "parallel", "forecast", "plan", "config", "layout", "units"}
            | {"labels", "numerics"}
        ),
        "training": frozenset({"model", "parallel", "plan", "config", "labels", "units"}),
        "commands": frozenset(
            {"training", "model", "engine", "memory", "parallel", "attention", "forecast", "plan", "layout"}
            | {"config", "units", "numerics", "labels"}
        ),
    }
)
# Single files that everybody may know, and that know nobody; and the package's own door, which knows all.
GROUND = frozenset({"config", "units", "numerics", "labels"})

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
HOT_PATH = (
    *("attention", "memory", "engine", "model.fused", "model.fused_linear", "model.liger"),
    *(f"model.experts.{name}" for name in ("operation", "passes", "passes_triton", "routes")),
)
# The tokenizers library raises the class Exception itself: caught there, and let go on where it is any other.
PLAIN_EXCEPTIONS = frozenset({("commands.finetune.base_model", "_load_tokenizer")})
# A message begins with the package, or with the call that it is about: `FPDTPlugin(sp_size=0): …`, `DiskFile.read: …`.
MESSAGE = re.compile(rf"{PACKAGE}: |[A-Z]\w+[(.:]")
# Not the user's: reasons that another message goes round, and what commands print after a prefix of theirs.
REASONS = (
    *("commands", "forecast", "plan.by_layer", "config.parse_tokens", "config._count", "config._number_or_auto"),
    *(
        "config._flag",
        "engine.recurrent",
        "engine.trial_run",
        "memory.disk._move",
        "labels.check_padding",
    ),
    *("model.head._norm_forward", "model.head._visited_forward", "labels.check_padding"),
)
AUTOGRAD_STATICS = frozenset({"forward", "backward"})


@dataclass(frozen=True)
class Module:
    """One source file: its name inside the package (`engine.layer`, `plan.__init__`), its text and its tree."""

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


def rooms(module: Module) -> Problems:
    """A room imports from the doors of the rooms that it may know, and never from behind one."""
    own = room_of(module.name)
    if own not in ROOMS and own not in GROUND and module.name != "__init__":
        yield f"{module.name}: it lies in no room of tests/helpers/architecture.py"
        return
    for line, target, _ in own_imports(module):
        other = room_of(target)
        if other == own or module.name == "__init__":
            continue
        if target == "" or other not in ROOMS.get(own, frozenset()):
            yield f"{module.name}:{line}: {own} must not import {target or PACKAGE}"
        elif target != other:
            yield f"{module.name}:{line}: imports {target}, behind the door of {other}"


def room_of(name: str) -> str:
    """The room of a module; a single file is its own."""
    return name.split(".")[0]


def own_imports(module: Module) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of everything of the package that a module imports, by full names inside the package."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level:
                folders = [PACKAGE, *module.name.split(".")[:-1]]
                parts = [*folders[: len(folders) + 1 - node.level], *parts]
            if parts and parts[0] == PACKAGE:
                yield from ((node.lineno, ".".join(parts[1:]), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, *rest = alias.name.split(".")
                if head == PACKAGE:
                    yield node.lineno, ".".join(rest), None


def circles(modules: list[Module]) -> Problems:
    """Imports inside a room, its door aside, go in no circle."""
    names = {module.name for module in modules}
    edges = {module.name: sorted(_neighbours(module, names)) for module in modules}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Problems:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for other in edges[name]:
                yield from visit(other, (*path, name))
            done.add(name)

    for name in edges:
        yield from visit(name, ())


def _neighbours(module: Module, names: set[str]) -> Iterator[str]:
    for _, target, name in own_imports(module):
        found = next((full for full in (f"{target}.{name}", target) if full in names), None)
        if found is not None and room_of(found) == room_of(module.name):
            yield found


def closed_doors(modules: list[Module]) -> Problems:
    """What is imported from a door is in its `__all__`."""
    doors = {module.name.removesuffix(".__init__"): _handed_out(module.tree) for module in modules if _is_door(module)}
    for module in modules:
        for line, target, name in own_imports(module):
            if target in doors and room_of(target) != room_of(module.name) and name not in doors[target]:
                yield f"{module.name}:{line}: {target} does not hand out {name}"


def _is_door(module: Module) -> bool:
    return module.name.endswith(".__init__") and module.name.count(".") == 1


def _handed_out(tree: ast.Module) -> frozenset[str]:
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return frozenset(ast.literal_eval(lists[0])) if lists else frozenset()


# Forbidden words -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A pattern over what code mentions (see `_mentions`), and the rooms or files where it may or may not stand."""

    pattern: str
    allowed: tuple[str, ...] | None = None
    forbidden: tuple[str, ...] = ()

    def is_broken_by(self, module: str, mention: str) -> bool:
        """Whether the module may not say that."""
        banned = _is_in(module, self.forbidden) if self.allowed is None else not _is_in(module, self.allowed)
        return banned and re.search(self.pattern, mention) is not None


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


WORDS = (
    Word(r"\bStream\(|(?<!threading\.)\bEvent\(", ("memory.transfers",)),
    Word(r"\b(wait_event|wait_stream|record_stream|pin_memory|non_blocking)\b", ("memory.transfers",)),
    Word(r"\btorch\.distributed\b", ("parallel", "training", "commands.bench.ranks")),
    Word(r"\b(all_to_all|all_reduce)", ("parallel", "commands.bench.ranks")),
    Word(
        r"\bflash_attn|\baten\._\w*attention|\b_scaled_dot_product_|\b_flash_attention_",
        ("attention.kernels",),
    ),
    Word(r"^import torch\b", forbidden=("layout", "plan", "forecast")),
    Word(r"^import transformers\b", ("model", "training", "commands")),
    Word(r"\bsynchronize\(|\.item\(|\bbarrier\(", forbidden=HOT_PATH),
    Word(r"^(builtins\.)?print\(", ("commands",)),
)


def forbidden_words(module: Module) -> Problems:
    """Streams in one file, collectives, kernels and transformers in their rooms, no waiting on the hot path, …"""
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


def messages(module: Module) -> Problems:
    """What is raised or logged for a user says who speaks; a text that is put together elsewhere is not seen."""
    functions = (f for f in module.functions() if _is_in(f"{module.name}.{f.name}", REASONS))
    trees = [module.tree] if _is_in(module.name, REASONS) else functions
    exempt = {node for tree in trees for node in ast.walk(tree)}
    for node in ast.walk(module.tree):
        raised = node.exc if isinstance(node, ast.Raise) else node
        logged = isinstance(raised, ast.Call) and _dotted(raised.func).startswith("logger.")
        if node in exempt or not isinstance(raised, ast.Call) or not (logged or raised is not node):
            continue
        texts = [text for arg in raised.args if (text := _first_words(arg)) is not None][:1]
        if any(MESSAGE.match(text) is None for text in texts):
            yield f"{module.name}:{raised.lineno}: a message begins with '{PACKAGE}: ', not '{texts[0][:20]}'"


def _first_words(value: ast.expr) -> str | None:
    """Of a text that stands there, up to what is put in; None where it is no text."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "format":
        return _first_words(value.func.value)
    if isinstance(value, ast.JoinedStr):
        return (_first_words(value.values[0]) or "") if value.values else ""
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


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
    """Functions whose parameters others dictate: autograd.Function's, transformers' attention function.

    A Triton kernel takes each tensor by itself, and the sizes that it is compiled for.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and any(_dotted(base).endswith("Function") for base in node.bases):
            yield from (f for f in node.body if isinstance(f, FUNCTIONS) and f.name in AUTOGRAD_STATICS)
        elif isinstance(node, FUNCTIONS) and (
            (module.name, node.name) == ("model.attention_function", "fpdt_attention")
            or any(_dotted(each) == "triton.jit" for each in node.decorator_list)
        ):
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


RULES: tuple[Rule, ...] = (rooms, forbidden_words, module_state, broad_except, messages, asserts, budgets, docstrings)
