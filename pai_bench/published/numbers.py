"""Numbers from papers: the network, the method, the target, the value and its source. Reads the files in `papers/`."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from pai_bench.errors import ConfigError

PAPERS = Path(__file__).parent / "papers"

ACCURACY = "accuracy"
MASK = "mask"
# What a number measures: whether training or the mask decides it, and its description. Papers print accuracies in
# percent; here they are fractions.
QUANTITIES = {
    "test_top1": (ACCURACY, "test accuracy after the last epoch, %"),
    "best_test_top1": (ACCURACY, "test accuracy in the best test epoch, %"),
    "test_top1_at_best_validation": (ACCURACY, "test accuracy in the epoch best on the validation split, %"),
    "test_top5": (ACCURACY, "top-5 test accuracy after the last epoch, %"),
    "layer_density": (MASK, "density of a layer"),
    "multiply_adds": (MASK, "multiply-adds left, as a share of the dense network's"),
    "critical_compression": (MASK, "log10 of the greatest compression on the grid that leaves no layer empty"),
    "collapse_threshold": (MASK, "log10 of the compression at which a layer is emptied"),
}
WITHOUT_TARGET = ("critical_compression", "collapse_threshold")  # these describe a whole curve
EVIDENCE = {
    "V": "read in a data file or a table of a public repository",
    "T": "read off a picture of the paper's table",
    "C": "the recipe is in released code, the number was not read",
    "R": "recalled; check it against the paper before you rely on it",
    "D": "derived from published definitions, not printed in the paper",
}
TARGETS = ("sparsity", "density", "compression", "log10_compression")
NETWORK = ("dataset", "model", "pruner")

_OF_PAPER = {"paper", "arxiv", "tables"}
_OF_TABLE = {
    "name", "quantity", "evidence", "source", "num_runs", "across", "values", "file", "recipe", "no_recipe",
    "tolerance", "note",
}  # fmt: skip
# The columns after the settings, in a table with one number a line. The last two may be left out.
_OF_LINE = ("value", "sd", "num_runs")
# Large tables take long to read; the loader in C takes a tenth of the time.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Tolerance:
    """How much a number that needs no training may differ: the sum of both parts."""

    absolute: float = 0.0
    relative: float = 0.0  # of the published number


@dataclass(frozen=True)
class Table:
    """What all numbers of a table or a figure have in common."""

    paper: str  # the name of the yaml file
    title: str  # authors, year, title
    arxiv: str | None
    name: str
    quantity: str
    evidence: str
    source: str
    recipe: tuple[str, ...] | None  # overrides of a run; the settings of a number are added
    no_recipe: str | None  # why there is no recipe
    tolerance: Tolerance | None  # if given, it alone decides the verdict
    note: str | None

    @property
    def is_accuracy(self) -> bool:
        """Whether training decides it."""
        return QUANTITIES[self.quantity][0] == ACCURACY


@dataclass(frozen=True)
class Number:
    """One published number."""

    table: Table
    settings: Mapping[str, str]  # as on the command line; always with dataset, model and pruner
    target: str | None  # as printed, like "sparsity=0.95"
    density: float | None  # the same target as a density
    layer: int | None  # for the density of a layer; counted from 1
    value: float  # accuracies are fractions
    sd: float | None  # sample standard deviation over runs
    num_runs: int | None
    rounding: float  # half of the last digit that was printed

    @property
    def label(self) -> str:
        """The settings of the number in the words of the command line."""
        words = [f"{key}={value}" for key, value in self.settings.items()]
        words += [self.target] if self.target else []
        return " ".join(words + ([f"layer={self.layer}"] if self.layer else []))


def read(*folders: Path) -> list[Number]:
    """Every number in the yaml files of some folders and the CSV files beside them, in the order of files and tables.

    docs/published.md describes the form of the files.

    Raises:
        ConfigError: a folder has no such file, or a file has another form.
    """
    found = []
    for folder in folders:
        paths = sorted(folder.glob("*.yaml"))
        if not paths:
            raise ConfigError(f"{folder}: there are no papers (*.yaml); give a folder that has some")
        for path in paths:
            found += _paper(path)
    return found


def choose(numbers: Sequence[Number], words: Sequence[str]) -> list[Number]:
    """The numbers that match every word. A word is a part of the paper's or the table's name, or a value of a setting.

    Raises:
        ConfigError: no number matches.
    """

    def fits(number: Number, word: str) -> bool:
        names = f"{number.table.paper} {number.table.title} {number.table.name}".lower()
        return word.lower() in names or word in (*number.settings.values(), number.target)

    found = [number for number in numbers if all(fits(number, word) for word in words)]
    if not found:
        raise ConfigError(f"--only {' '.join(words)}: no published number fits all of it; take a word away")
    return found


def _paper(path: Path) -> list[Number]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: it cannot be read; {' '.join(str(error).split())}") from error
    _require(isinstance(content, dict), path, f"a mapping with {', '.join(sorted(_OF_PAPER))} is needed")
    _check_keys(content, _OF_PAPER, {"paper", "tables"}, path)
    _require(isinstance(content["tables"], list), path, "tables: a list is needed")
    _check_texts(content, ("paper", "arxiv"), path)
    found = []
    for number, entry in enumerate(content["tables"], start=1):
        _require(isinstance(entry, dict), path, f"table {number}: a mapping is needed")
        where = f"{path}: {entry.get('name', f'table {number}')}"
        _check_keys(entry, _OF_TABLE, {"name", "quantity", "evidence", "source"}, where)
        texts = ("name", "quantity", "evidence", "source", "values", "file", "across", "no_recipe", "note")
        _check_texts(entry, texts, where)
        table = _table(path, content, entry, where)
        found += _numbers(table, entry, *_cells(path, entry, where))
    return found


def _require(condition: bool, where: Path | str, problem: str) -> None:
    if not condition:
        raise ConfigError(f"{where}: {problem}")


def _check_keys(entry: dict[str, Any], known: set[str], needed: set[str], where: Path | str) -> None:
    for key in entry:
        _require(key in known, where, f"{key}: there is no such entry; there are {', '.join(sorted(known))}")
    for key in sorted(needed):
        _require(entry.get(key) not in (None, ""), where, f"{key} is missing")


def _check_texts(entry: dict[str, Any], keys: Sequence[str], where: Path | str) -> None:
    for key in keys:
        _require(isinstance(entry.get(key), str | None), where, f"{key}={entry.get(key)}: put it in quotes, as a text")


def _table(path: Path, paper: dict[str, Any], entry: dict[str, Any], where: str) -> Table:
    quantity, evidence = entry["quantity"], entry["evidence"]
    _require(quantity in QUANTITIES, where, f"quantity={quantity}: give one of {', '.join(QUANTITIES)}")
    _require(evidence in EVIDENCE, where, f"evidence={evidence}: give one of {', '.join(EVIDENCE)}")
    recipe = entry.get("recipe")
    _require((recipe is None) != (entry.get("no_recipe") is None), where, "give either recipe or no_recipe, the reason")
    texts = recipe is None or (isinstance(recipe, list) and all(isinstance(word, str) for word in recipe))
    _require(texts, where, f"recipe={recipe}: give a list of overrides")
    tolerance = None
    if (given := entry.get("tolerance")) is not None:
        numbers = isinstance(given, dict) and all(isinstance(v, int | float) and v >= 0 for v in given.values())
        _require(
            numbers and set(given) <= {"absolute", "relative"},
            where,
            f"tolerance={given}: give absolute, relative or both as numbers of 0 or more",
        )
        tolerance = Tolerance(**given)
    table = Table(
        paper=path.stem,
        title=paper["paper"],
        arxiv=paper.get("arxiv"),
        name=entry["name"],
        quantity=quantity,
        evidence=evidence,
        source=entry["source"],
        recipe=None if recipe is None else tuple(recipe),
        no_recipe=entry.get("no_recipe"),
        tolerance=tolerance,
        note=entry.get("note"),
    )
    _require(
        table.is_accuracy == (tolerance is None), where, "tolerance: numbers that need no training have one, others not"
    )
    return table


def _cells(path: Path, entry: dict[str, Any], where: str) -> tuple[list[list[str]], str]:
    """The lines of a table, split into cells, and where they are read."""
    name = entry.get("file")
    _require((name is None) != (entry.get("values") is None), where, "give either values or file, where they are")
    if name is None:
        text, where = entry["values"], f"{where}: values"
    else:
        where = f"{where}: file={name}"
        _require(Path(name).name == name, where, "give the name of a file that lies beside this one")
        try:
            text = (path.parent / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: it cannot be read ({error})") from error
    try:
        return [line for line in csv.reader(text.splitlines(), skipinitialspace=True, strict=True) if line], where
    except csv.Error as error:
        raise ConfigError(f"{where}: its cells cannot be told apart ({error})") from error


def _numbers(table: Table, entry: dict[str, Any], lines: list[list[str]], where: str) -> list[Number]:
    """The numbers in the cells of a table. The first columns are settings.

    `across` names the setting of the other columns. Without it, a line has one number.
    """
    _require(len(lines) > 1, where, "a line of names and a line of numbers are the least")
    header, rows = [word.strip() for word in lines[0]], lines[1:]
    across = entry.get("across")
    num_settings = next((i for i, word in enumerate(header) if word == "value" or _is_number(word)), len(header))
    names, columns = header[:num_settings], header[num_settings:]
    _require(bool(columns), where, f"{header} has no columns of numbers")
    fits = _is_line(columns) if across is None else all(map(_is_number, columns))
    wanted = "the one called value, and sd and num_runs after it where they are known" if across is None else "numbers"
    _require(fits, where, f"with across={across} the columns after the settings are {wanted}")
    _require(len(set(header)) == len(header), where, f"{header} names a column twice")
    num_runs = _num_runs(entry.get("num_runs"), where)
    found = []
    for row in rows:
        _require(len(row) == len(header), where, f"{row} has {len(row)} cells, its header {len(header)}")
        cells = [cell.strip() for cell in row]
        words = {key: word for key, word in zip(names, cells, strict=False) if word}
        values = cells[num_settings:]
        if across is None:
            found.append(_of_line(table, words, dict(zip(columns, values, strict=True)), num_runs, where))
        else:  # an empty cell: the paper has no number there
            of_cells = zip(columns, values, strict=True)
            found += [_number(table, words | {across: at}, cell, num_runs, where) for at, cell in of_cells if cell]
    return found


def _is_line(columns: Sequence[str]) -> bool:
    """Whether the columns are those of a table with one number a line."""
    return columns[0] == "value" and list(columns) == [name for name in _OF_LINE if name in columns]


def _of_line(table: Table, words: dict[str, str], cells: Mapping[str, str], num_runs: int | None, where: str) -> Number:
    """The number of a line, with a standard deviation and a number of runs of its own where it has them."""
    deviation, own = cells.get("sd"), cells.get("num_runs")
    if own:
        num_runs = _num_runs(int(own) if own.isdecimal() else own, where)
    return _number(table, words, f"{cells['value']}±{deviation}" if deviation else cells["value"], num_runs, where)


def _num_runs(given: Any, where: str) -> int | None:
    _require(given is None or (isinstance(given, int) and given >= 1), where, f"num_runs={given}: give 1 or more")
    num_runs: int | None = given
    return num_runs


def _number(table: Table, words: dict[str, str], cell: str, num_runs: int | None, where: str) -> Number:
    targets = [key for key in TARGETS if key in words]
    _require(len(targets) < 2, where, f"{' and '.join(targets)} say the same thing; give one of them")
    target = targets[0] if targets else None
    density = _density(target, words[target], where) if target else None
    layer = words.get("layer")
    _require(layer is None or (layer.isdigit() and int(layer) >= 1), where, f"layer={layer}: give 1 or more")
    settings = {key: word for key, word in words.items() if key not in (*TARGETS, "layer")}
    for key in NETWORK:
        _require(key in settings, where, f"{key} is missing in {words}")
    without = table.quantity in WITHOUT_TARGET
    _require(
        (target is None) == without,
        where,
        f"{words} {'has a' if without else 'needs one'} target, one of {', '.join(TARGETS)}",
    )
    of_layer = table.quantity == "layer_density"
    _require((layer is not None) == of_layer, where, f"{words} {'needs a' if of_layer else 'has a'} layer")
    mean, _, deviation = cell.partition("±")
    numbers = _is_number(mean) and (not deviation or (_is_number(deviation) and float(deviation) >= 0))
    _require(numbers, where, f"{cell!r} is no number, nor mean±deviation")
    scale = 100 if table.is_accuracy else 1
    value = float(mean) / scale
    if table.is_accuracy:
        _require(0 <= value <= 1, where, f"{cell} is no accuracy in percent")
    return Number(
        table,
        settings,
        f"{target}={words[target]}" if target else None,
        density,
        int(layer) if layer else None,
        value,
        float(deviation) / scale if deviation else None,
        num_runs,
        _half_digit(mean) / scale,
    )


def _density(target: str, text: str, where: str) -> float:
    _require(_is_number(text), where, f"{target}={text} is no number")
    given = float(text)
    density = {
        "density": given,
        "sparsity": 1 - given,
        "compression": 1 / given if given else math.inf,
        "log10_compression": 10**-given,
    }[target]
    _require(0 < density <= 1, where, f"{target}={text} leaves nothing, or more than there is")
    return density


def _half_digit(text: str) -> float:
    """Half a unit of the last digit of a number."""
    return float(Decimal(5).scaleb(int(Decimal(text.strip()).as_tuple().exponent) - 1))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
