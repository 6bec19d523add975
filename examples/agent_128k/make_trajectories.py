"""Trajectories of an agent that answers questions about Python's standard library, made from its sources.

python examples/agent_128k/make_trajectories.py --count 500 --output trajectories.jsonl

Each asks where a function is defined and called. The agent looks at files with two tools until it has seen both, and
answers with what it saw. All answers are right, so what a model learns of them can be checked. Lengths are drawn as
those of published coding agents: half are below 38,000 tokens, 95 in 100 below 71,000.
"""

import argparse
import ast
import json
import math
import random
import re
import sysconfig
from pathlib import Path

CHARACTERS_A_TOKEN = 3.6  # of Python's sources, with Qwen3's tokenizer
MEDIAN_TOKENS, SIGMA = 38_000, 0.38
LINES_A_LOOK = 400
SYSTEM = "You answer questions about a code base. Look at its files with the tools before you answer."


def tool(name: str, description: str, **parameters: str) -> dict:
    """A tool's description, as chat templates take it."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("search", "Lines that contain a text, as file:line: text.", text="string"),
    tool("read", f"{LINES_A_LOOK} lines of a file from a line on.", path="string", line="integer"),
]


def call(name: str, **arguments: object) -> dict:
    """A turn of the assistant that calls a tool."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def answer(of: str, text: str) -> dict:
    """What a tool gave."""
    return {"role": "tool", "name": of, "content": text}


def sources() -> dict[str, list[str]]:
    """Lines of each module at the top of the standard library, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))}
    return {name: text.splitlines() for name, text in texts.items()}


def functions(files: dict[str, list[str]]) -> list[tuple[str, str, int, str]]:
    """(name, file, line, first line of the docstring) of public functions whose names are unusual enough to search."""
    found = []
    for path, lines in files.items():
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.name) > 6:
                told = (ast.get_docstring(node) or "").partition("\n")[0]
                found += [(node.name, path, node.lineno, told)] if told else []
    return found


def trajectory(files: dict[str, list[str]], asked: tuple[str, str, int, str], characters: int) -> dict:
    """One conversation that reads at least `characters` of files, or all that there is to read."""
    name, path, line, told = asked
    word = re.compile(rf"\b{re.escape(name)}\b")
    hits = [
        (file, at + 1, text) for file, lines in files.items() for at, text in enumerate(lines) if word.search(text)
    ]
    found = "\n".join(f"{file}:{at}: {text.strip()}" for file, at, text in hits)
    question = f"Where is `{name}` defined, what does it do, and which other modules name it?"
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    turns += [call("search", text=name), answer("search", found)]
    # The definition first, then the files that name it, then those beside them.
    others = [file for file in dict.fromkeys(file for file, _, _ in hits) if file != path]
    starts = [(path, line)] + [(file, 1) for file in [*others, *files]]
    for file, start in starts:
        for at in range(start, len(files[file]) + 1, LINES_A_LOOK):
            if characters <= 0:
                break
            look = "\n".join(files[file][at - 1 : at - 1 + LINES_A_LOOK])
            turns += [call("read", path=file, line=at), answer("read", look)]
            characters -= len(look)
    named = ", ".join(others) or "no other module"
    turns.append({"role": "assistant", "content": f"`{name}` is defined in {path}:{line}. {told} Named by: {named}."})
    return {"messages": turns, "tools": TOOLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="trajectories")
    parser.add_argument("--output", default="trajectories.jsonl", help="file with a trajectory a line")
    parser.add_argument("--scale", type=float, default=1.0, help="lengths are multiplied by this: 0.02 for a try")
    options = parser.parse_args()
    draw, files = random.Random(0), sources()
    asked = functions(files)
    with open(options.output, "w", encoding="utf-8") as out:
        for _ in range(options.count):
            tokens = draw.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA) * options.scale
            row = trajectory(files, draw.choice(asked), round(tokens * CHARACTERS_A_TOKEN))
            out.write(json.dumps(row) + "\n")
    print(f"{options.count} trajectories about {len(asked)} functions: {options.output}")


if __name__ == "__main__":
    main()
