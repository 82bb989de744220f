"""The settings of a function, read from its source without importing it, and whether values fit them."""

import ast
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from pai_bench.errors import ConfigError

_LARGEST = 2**63  # no integer of a config lies beyond
_BASIC = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null"}


@dataclass(frozen=True)
class Setting:
    """A keyword-only argument of a function."""

    annotation: ast.expr
    module: str  # in which the names of the annotation mean something
    optional: bool


def shown(value: object) -> str:
    """A value as it would stand on the command line, cut where it is long."""
    if isinstance(value, list):
        text = f"[{','.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# Reading source -------------------------------------------------------------------------------------------------------


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies. Unlike importlib.util.find_spec this runs no code of the packages around it."""
    first, *inner = module.split(".")
    found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(first, None))), None)
    for part in inner:
        if found is None or found.submodule_search_locations is None:
            return None
        # By the last part of its name alone: a folder without __init__.py would ask for its parent to be imported.
        found = PathFinder.find_spec(part, list(found.submodule_search_locations))
    return found


@lru_cache
def _tree(module: str) -> ast.Module | None:
    """The syntax tree of a module; None if there is no such module, or none with source."""
    spec = _spec(module) if module else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


@lru_cache
def settings_of(target: str) -> dict[str, Setting]:
    """The settings of the function with a dotted path.

    Raises:
        ConfigError: there is no such function.
    """
    module, _, function = target.rpartition(".")
    if not module or not all(part.isidentifier() for part in target.split(".")) or function.startswith("_"):
        raise ConfigError(
            f"_target_={target}: give the dotted path of a public function, such as package.module.function"
        )
    tree = _tree(module)
    if tree is None:
        raise ConfigError(
            f"_target_={target}: there is no module {module!r} whose source can be read; put the folder "
            "that holds it on PYTHONPATH"
        )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {
                argument.arg: Setting(argument.annotation or ast.Name("Any"), module, default is not None)
                for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            }
    raise ConfigError(f"_target_={target}: there is no function {function!r} in {module}; check its name")


@lru_cache
def _defined(name: str, module: str) -> tuple[ast.expr | ast.ClassDef, str] | None:
    """The definition of a name in an annotation (a type or a TypedDict), and the module where it is defined."""
    tree = _tree(module)
    for node in tree.body if tree is not None else []:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return node.value, module
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.name for alias in node.names]:
            return _defined(name, node.module) if node.module.startswith("pai_bench.") else None
    return None


# Whether a value fits -------------------------------------------------------------------------------------------------


def problem(value: object, annotation: ast.expr, module: str = "") -> str | None:
    """What to give in place of a value that is not of an annotated type; None if it is. Unknown types take anything."""
    if isinstance(annotation, ast.BinOp):  # X | Y
        parts = [problem(value, part, module) for part in (annotation.left, annotation.right)]
        return None if None in parts else " or ".join(dict.fromkeys(part for part in parts if part))
    if isinstance(annotation, ast.Subscript):
        origin, inner = _last(annotation.value), annotation.slice
        parameters = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        match origin:
            case "Literal":
                choices = [choice.value for choice in parameters if isinstance(choice, ast.Constant)]
                fits = any(value == choice and type(value) is type(choice) for choice in choices)
                return None if fits else f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(shown, choices))}"
            case "Annotated":
                return problem(value, parameters[0], module) or _outside(value, parameters[1:])
            case "list" | "Sequence":
                return _list_problem(value, parameters[0], module)
            case "dict":
                return None if isinstance(value, dict) else "settings in braces, {key: value}"
        return None
    name = ast.unparse(annotation)
    if name in _BASIC:
        return None if _is_basic(value, name) else _BASIC[name]
    meaning, where = _defined(name, module) or (None, "")
    if isinstance(meaning, ast.ClassDef):
        return None if isinstance(value, dict) or not _fields(meaning) else f"{', '.join(_fields(meaning))} in braces"
    return problem(value, meaning, where) if meaning is not None else None


def _last(name: ast.expr) -> str:
    """A dotted name without what stands before its last dot."""
    return ast.unparse(name).rpartition(".")[2]


def _fields(of: ast.ClassDef) -> dict[str, ast.expr]:
    """The keys of a TypedDict."""
    named = [node for node in of.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): node.annotation for node in named}


def _is_basic(value: object, name: str) -> bool:
    if name == "None":
        return value is None
    if name == "bool":
        return isinstance(value, bool)
    if name == "str":
        return isinstance(value, str) and value.strip() != "" and value.isprintable()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST if isinstance(value, int) else name == "float" and math.isfinite(value)


def _list_problem(value: object, of: ast.expr, module: str) -> str | None:
    if not isinstance(value, list):
        return f"a list, such as {'[a,b]' if ast.unparse(of) == 'str' else '[1,2]'}"
    wrong = next((said for item in value if (said := problem(item, of, module))), None)
    return f"{wrong} for each" if wrong else None


def _outside(value: Any, markers: list[ast.expr]) -> str | None:
    """The range that a value lies outside of, where its type is right."""
    if value is None:
        return None
    bounds: dict[str, Any] = {}
    for marker in markers:
        if isinstance(marker, ast.Call):
            given = [*marker.args, *(keyword.value for keyword in marker.keywords)]
            bounds[_last(marker.func)] = [ast.literal_eval(number) for number in given]
    if "Len" in bounds:
        least, most = (*bounds["Len"], None)[:2]
        if least <= len(value) <= (most or math.inf):
            return None
        return f"{'' if least == most else 'at least '}{least} value{'s' * (least > 1)}"
    limits = {name: numbers[0] for name, numbers in bounds.items()}
    return None if _inside(value, limits) else _range_words(limits)


def _inside(value: float, bounds: Mapping[str, float]) -> bool:
    return (
        value >= bounds.get("Ge", -math.inf)
        and value <= bounds.get("Le", math.inf)
        and value > bounds.get("Gt", -math.inf)
        and value < bounds.get("Lt", math.inf)
    )


def _range_words(bounds: Mapping[str, float]) -> str:
    low, high = bounds.get("Ge", bounds.get("Gt")), bounds.get("Le", bounds.get("Lt"))
    if high is None:
        return f"{low} or more" if "Ge" in bounds else f"a number above {low}"
    if low is None:
        return f"{high} or less" if "Le" in bounds else f"a number below {high}"
    return f"one in {'[' if 'Ge' in bounds else '('}{low}, {high}{']' if 'Le' in bounds else ')'}"


def check_value(path: str, value: object, annotation: ast.expr, module: str = "") -> None:
    """Checks one setting.

    Args:
        path: where in the config it stands.
        module: in which the names of the annotation mean something.

    Raises:
        ConfigError: it is of the wrong type or out of range.
    """
    if said := problem(value, annotation, module):
        raise ConfigError(f"{path}={shown(value)}: give {said}")
    meaning, where = _defined(ast.unparse(annotation), module) or (None, "")
    if isinstance(meaning, ast.ClassDef) and isinstance(value, dict) and (known := _fields(meaning)):
        check_keys(path, value, list(known), path)
        for key, of in known.items():
            check_value(f"{path}.{key}", value[key], of, where)


def check_keys(
    path: str, settings: dict[str, Any], known: list[str], owner: str, optional: Collection[str] = ()
) -> None:
    """Checks that all settings are there, and no others.

    Raises:
        ConfigError: one is unknown or missing.
    """
    dot = f"{path}." if path else ""
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{dot}{key}={shown(value)}: there is no such setting; {owner} has: {', '.join(known) or 'none'}"
            )
    for key in known:
        if key not in settings and key not in optional:
            raise ConfigError(f"{dot}{key} is missing: {owner} needs it; add {dot}{key}=VALUE")


def check_call(path: str, call: object) -> None:
    """Checks a call of the config: its arguments against the keyword-only arguments of the function that it names.

    Positional arguments are what a run supplies (a model, scores, a sparsity); keyword-only ones are settings.

    Args:
        path: where in the config the call stands; a group has a name beside its function, a part of one has not.

    Raises:
        ConfigError: an argument is unknown, missing, of the wrong type or out of range, or there is no such function.
    """
    named = "." not in path
    if not isinstance(call, dict) or "_target_" not in call or (named and "name" not in call):
        needs = "a name and a _target_" if named else "a _target_"
        raise ConfigError(f"{path}={shown(call)}: it needs {needs}; choose an option of {path.partition('.')[0]}=")
    target = call["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_={shown(target)}: give the dotted path of a function")
    try:
        settings = settings_of(target)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from error
    given = {key: value for key, value in call.items() if key != "_target_" and not (named and key == "name")}
    check_keys(path, given, list(settings), target, [key for key, setting in settings.items() if setting.optional])
    for key, value in given.items():
        check_value(f"{path}.{key}", value, settings[key].annotation, settings[key].module)
