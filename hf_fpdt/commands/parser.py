"""A command whose options are dataclasses: a YAML file may give them, help shows ours, mistakes are one line.

Precedence, as in TRL: the command line, then the file of `--config`, then what an earlier run was given, then the
defaults. Names may be written with underscores or dashes, in the file too.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .options import UserMistake


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each option once, in the writing with underscores, and its default where it says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=max(100, min(119, shutil.get_terminal_size().columns)))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not names:
            return super()._format_action_invocation(action)
        if action.nargs == 0 or action.const is not None:  # a flag, which may have a value too
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default in (False, [], argparse.SUPPRESS):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class _HelpAll(argparse.Action):
    """`--help-all`: the other library's options too."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.print_help_all()
        parser.exit()


class CommandParser(HfArgumentParser):
    """transformers' parser of dataclasses, with `--config`.

    Args:
        aliases: further names by option, such as {"--learning_rate": ("--lr",)}.
        **kwargs: as for ArgumentParser.
    """

    def __init__(self, aliases: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        self._aliases = aliases
        self._hidden: list[argparse.Action] = []
        self._earlier: Callable[[Sequence[str]], list[str]] = lambda words: []
        super().__init__((), formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def add_options(self, title: str, dataclass: type, description: str | None = None, hidden: bool = False) -> None:
        """A group of options, one a field; of a hidden group only `--help-all` tells."""
        before = len(self._actions)
        group = self.add_argument_group(title, description)
        hints = get_type_hints(dataclass)
        for field in dataclasses.fields(dataclass):
            if field.init:
                field.type = hints[field.name]
                self._parse_dataclass_field(group, field)
        for action in self._actions[before:]:
            self._add_aliases(action)
            action.type = _readable(action, hints[action.dest])
        if hidden:
            self._hidden += self._actions[before:]
            self.add_argument("--help_all", "--help-all", action=_HelpAll, nargs=0, help="show all options, and exit")

    def add_config(self) -> None:
        """`--config FILE`."""
        self.add_argument(
            "--config", metavar="FILE.yaml", help="options from a YAML file, by the same names; the command line wins"
        )

    def set_earlier(self, earlier: Callable[[Sequence[str]], list[str]]) -> None:
        """What `earlier` makes of the words given, such as those of an earlier run, comes before them; they win."""
        self._earlier = earlier

    def set_types(self, types: Mapping[str, Callable[[str], Any]]) -> None:
        """How the text of these options is read."""
        for action in self._actions:
            action.type = types.get(action.dest, action.type)

    def require(self, name: str) -> None:
        """An option that its dataclass lets be left out."""
        self._option_string_actions[f"--{name}"].required = True

    def _add_aliases(self, action: argparse.Action) -> None:
        for name in self._aliases.get(action.option_strings[0], ()):
            action.option_strings = [*action.option_strings, name]
            self._option_string_actions[name] = action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ArgumentParser's, with the file before the command line; what is not known is a mistake here."""
        given = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        config, _ = first.parse_known_args(given)
        from_file = self._words(Path(config.config)) if config.config else []
        words = [*from_file, *given]
        words = [*self._earlier(words), *words]
        options, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown option {unknown[0]}{_nearest(unknown[0], self._option_string_actions)}")
        options.words = _without_config(words)
        return options, []

    def _words(self, path: Path) -> list[str]:
        """The file as words of a command line, so that both are read by the same rules."""
        words: list[str] = []
        for key, value in _read_yaml(path).items():
            option = _underscored(f"--{key}")
            if option not in self._option_string_actions or option in ("--help", "--help_all", "--config"):
                nearest = _nearest(option, self._option_string_actions)
                raise UserMistake(f"--config: {path} has an unknown key {key!r}{nearest}")
            if isinstance(value, list) and self._option_string_actions[option].nargs == "+":
                words += [option, *map(_word, value)]
            elif value is not None:  # what is null is left at its default
                words.append(f"{option}={_word(value)}")
        return words

    def format_help(self) -> str:
        """Without the hidden options."""
        helps = [action.help for action in self._hidden]
        for action in self._hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(self._hidden, helps, strict=True):
                action.help = text

    def print_help_all(self) -> None:
        """With them."""
        self._print_message(super().format_help(), sys.stdout)

    def error(self, message: str) -> NoReturn:
        """One line; the usage of so many options would hide it."""
        text = re.sub(r"(--\w+)(/--?[\w-]+)+", r"\1", message.removeprefix("argument ")).removesuffix(".")
        raise UserMistake(f"{text}; see {self.prog} --help")


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, parser: CommandParser, text: str
) -> None:
    """Put a parser of this kind among commands that argparse makes itself."""
    commands.add_parser(name, help=text)
    commands._name_parser_map[name] = parser


def _without_config(words: Sequence[str]) -> list[str]:
    """What was given, but for the file, whose content is among the words."""
    kept: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before != "--config" and not re.match(r"--config(=|$)", word):
            kept.append(word)
    return kept


def _readable(action: argparse.Action, hint: Any) -> Any:
    """The action's type, or one for what transformers' parser takes for a type that no text is ever of."""
    found: Any = action.type
    if get_origin(found) is dict or dataclasses.is_dataclass(found):
        return partial(_object, get_origin(found) or found)
    return _flag_or_text if found is string_to_bool and str in get_args(hint) else found


def _object(kind: Callable[..., Any], text: str) -> Any:
    """A JSON object as what an option holds."""
    try:
        return kind(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"a JSON object was expected, got {text!r} ({error})") from error


def _flag_or_text(text: str) -> bool | str:
    try:
        flag: bool = string_to_bool(text)
        return flag
    except argparse.ArgumentTypeError:
        return text


def _underscored(word: str) -> str:
    """`--max-length=1K` → `--max_length=1K`: both are the same option, also where an alias has one of them alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserMistake(f"--config: {path} can't be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserMistake(f"--config: {path} holds no options; give one a line, as in `max_length: 64K`")
    return {str(key): value for key, value in content.items()}


def _nearest(option: str, known: Iterable[str]) -> str:
    """To end a message about an option that there is not."""
    name = option.partition("=")[0]
    names = difflib.get_close_matches(name, [option for option in known if "-" not in option.lstrip("-")], n=1)
    return f"; did you mean {names[0]}?" if names else "; it is no option of this command"
