"""What a run prints at its end, and a sweep at its own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pai_bench.config.schema import RunConfig

_BAR = 24


def already(row: dict[str, Any], run: RunConfig) -> str:
    """A line about a run that is finished. It says so if weights or diagnostics are wanted that were not kept."""
    line = f"{run.directory} is finished already: {100 * row['test_top1']:.2f} % test accuracy"
    line += f", sparsity {row['sparsity']:.6g}"
    if run.keeps_weights and not (run.directory / "model.safetensors").is_file():
        line += f"; {weights_again(run.directory)}"
    if run.diagnostics is not None and row.get("diagnostics") != run.diagnostics.name:
        line += f"; diagnostics={run.diagnostics.name} was not recorded; to have it, {_again(run.directory)}"
    return line


def weights_again(directory: Path) -> str:
    """How to get the final weights of a finished run that did not keep them."""
    return f"its final weights were not kept; to have them, {_again(directory, ' with save_model=true')}"


def _again(directory: Path, how: str = "") -> str:
    return f"run it again{how}: remove {directory / 'result.json'}, or give another results_dir="


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 4.5 min, 2.0 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 90 else f"{hours:.1f} h"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    width = max(len(layer["name"]) for layer in layers)
    # Linear up to the densest layer. Up to 100 % it would be empty for most layers at 98 % sparsity.
    most = max(layer["density"] for layer in layers)
    scale = f"density (full bar: {100 * most:.3g} %, linear)"
    lines = [f"  {'layer':<{width}}  {'kept':>10} of {'size':>10}  {scale}"]
    for layer in layers:
        bar = "#" * round(_BAR * layer["density"] / most) if most else ""
        mark = "  collapsed" if layer["kept"] == 0 else ""
        share = f"{100 * layer['density']:7.2f} %"
        lines.append(f"  {layer['name']:<{width}}  {layer['kept']:>10,} of {layer['size']:>10,}  {share}  {bar}{mark}")
    return lines


def closing(row: dict[str, Any], layers: list[dict[str, Any]], directory: Path) -> str:
    """The summary as text.

    Args:
        row: the result row.
        layers: name, size, kept and density of each prunable tensor.
    """
    table = ["", *_layers(layers), ""] if row["num_kept"] < row["num_prunable"] else [""]
    lines = [*_of_accuracy(row), *_of_mask(row), *_of_changes(row), *_of_size(row)]
    told = [f"  {line}" for line in lines], table, [f"  {line}" for line in [*_troubles(row), *_of_costs(row)]]
    return "\n".join(["", *(line for part in told for line in part), f"  everything is in {directory}", ""])


def _of_accuracy(row: dict[str, Any]) -> list[str]:
    percent = {key: 100 * row[key] for key in ("test_top1", "best_test_top1") if row[key] is not None}
    accuracy = f"{percent['test_top1']:.2f} % test accuracy after the last epoch"
    if "best_test_top1" in percent:
        accuracy += f"   (best {percent['best_test_top1']:.2f} % in epoch {row['best_test_epoch']})"
    lines = [accuracy]
    if row["strong_test_top1"] is not None:
        lines.append(f"{100 * row['strong_test_top1']:.2f} % as the search left it, its weights untrained")
    if row["test_top1_at_best_validation"] is not None:
        selected = f"{100 * row['test_top1_at_best_validation']:.2f} % in epoch {row['selected_epoch']}"
        lines.append(f"{selected}, the best on the validation split")
    return lines


def _of_mask(row: dict[str, Any]) -> list[str]:
    lines = []
    if row["filter_sparsity"] is not None:
        filters = f"{row['num_filters_kept']:,} of {row['num_filters']:,} filters kept"
        lines.append(f"filter sparsity {row['filter_sparsity']:.6g}   {filters}")
    kept = f"{row['num_kept']:,} of {row['num_prunable']:,} weights kept"
    lines.append(f"sparsity {row['sparsity']:.6g}   compression {row['compression']:.4g}x")
    lines.append(kept + (f", {row['num_tied']:,} tied at the threshold" if row["num_tied"] else ""))
    if row["num_effective"] is not None and row["num_effective"] < row["num_kept"]:
        useless = row["num_kept"] - row["num_effective"]
        lines.append(
            f"effective sparsity {row['effective_sparsity']:.6g}: {useless:,} kept weights lie on no path from image "
            f"to output; {row['dead_units']:,} units are dead"
        )
    return lines


def _of_changes(row: dict[str, Any]) -> list[str]:
    """What an ablation, a transfer and the training have changed."""
    lines = []
    if row["ablation_overlap"] is not None:
        lines.append(f"ablation {row['ablation']}: {100 * row['ablation_overlap']:.2f} % of the kept weights unchanged")
    if row["transfer_overlap"] is not None:
        signs = f"{100 * row['transfer_overlap']:.2f} % of the kept weights have the sign with which they were drawn"
        lines.append(f"transfer {row['transfer']}: {signs}")
    if row["sign_agreement"] is not None and row["train_examples"]:
        lines.append(f"training has kept the sign of {100 * row['sign_agreement']:.2f} % of these weights")
    if row["num_rewires"]:
        moved = f"{row['num_rewires']:,} rewires, {100 * row['mean_churn']:.3g} % of the kept weights exchanged in each"
        lines.append(f"{row['rewire']}: {moved}; {100 * row['explored']:.3g} % of all weights were active at some time")
    return lines


def _of_size(row: dict[str, Any]) -> list[str]:
    dense, masked = row["macs_dense"], row["macs_masked"]
    lines = [f"{_count(dense)} multiply-adds an image, {_count(masked)} if zeros were free"]
    if row["macs_trained"] < dense:
        gain = f": a step took 1/{row['compact_speedup']:.3g} of the time" if row["compact_speedup"] else ""
        lines.append(f"{_count(row['macs_trained'])} were trained, without dead channels{gain}")
    return lines


def _troubles(row: dict[str, Any]) -> list[str]:
    lines = []
    if row["collapsed_layers"]:
        lines.append(f"LAYER COLLAPSE: nothing is kept in {', '.join(row['collapsed_layers'])}")
    if not row["output_depends_on_input"]:
        lines.append("NO SIGNAL: the output of the pruned network does not depend on the image")
    if row["stopped"]:
        lines.append("NOT TRAINED: on_collapse=stop")
    return lines


def _of_costs(row: dict[str, Any]) -> list[str]:
    lines = []
    if row["search_train_examples"]:
        lines.append(f"finding the mask took {_count(row['search_train_examples'])} images of training")
    if row["reused_examples"]:
        lines.append(f"{_count(row['reused_examples'])} images of all training were those of an earlier run")
    seconds = f"{duration(row['total_seconds'])} in all: {duration(row['prune_seconds'])} to prune"
    lines.append(f"{seconds}, {duration(row['train_seconds'])} to train at {_count(row['images_per_second'])} images/s")
    lines.append(f"{row['hardware']}, {row['precision']}, peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB")
    return lines


_PARTS = ("allocation", "schedule", "ablation", "rewire", "transfer")
_SETTINGS = ("prunable", "target", "repair")  # their values say little without their names
_MOST_COLUMNS = 6


def accuracies(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The test accuracies of several runs as lines of text: a table for each task, by method and compression.

    Runs that `on_collapse=stop` left untrained count in no mean.
    """
    tasks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault((row["task"], row["filter_sparsity"] is not None), []).append(row)
    lines: list[str] = []
    for (task, filters), found in tasks.items():
        name = f"{found[0]['dataset']}, {found[0]['model']}"
        same = {other for other, _ in tasks if other != task and other.rpartition("-")[0] == task.rpartition("-")[0]}
        title = f"{name} ({task.rpartition('-')[2]})" if same else name
        lines += ["", f"{title}{', by filters' if filters else ''}: test accuracy in percent", *_table(found)]
    return lines[1:]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each method, the dense network first, then by accuracy at the highest compression."""
    values: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found = values.setdefault(row["method"], {}).setdefault(row["target_sparsity"], [])
        found += [] if row["stopped"] else [100 * row["test_top1"]]
    labels = _labels(rows)
    dense = [method for method in values if set(values[method]) == {0.0}]
    pruned = values.keys() - set(dense)
    levels = sorted({level for method in pruned for level in values[method]})
    shown = levels[-_MOST_COLUMNS:]

    def order(method: str) -> list[float]:
        return [-(fmean(found) if (found := values[method].get(level)) else -1) for level in reversed(levels)]

    width = max(map(len, labels.values()))
    lines = ["".join([f"  {'':<{width}}", *(f"  {f'{1 / (1 - level):.4g}x':>15}" for level in shown)])] if shown else []
    for method in [*dense, *sorted(pruned, key=order)]:
        entries = [_entry(values[method].get(level)) for level in ([0.0] if method in dense else shown)]
        lines.append("".join([f"  {labels[method]:<{width}}", *(f"  {entry:>15}" for entry in entries)]).rstrip())
    numbers = sorted({len(found) for by_level in values.values() for found in by_level.values() if found}) or [0]
    seeds = " to ".join(map(str, numbers if len(numbers) == 1 else [numbers[0], numbers[-1]]))
    rest = f"; the {_MOST_COLUMNS} highest of {len(levels)} compressions" if len(levels) > _MOST_COLUMNS else ""
    return [*lines, f"  mean ± standard deviation of {seeds} run{'' if seeds == '1' else 's'}{rest}"]


def _labels(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The label of each method, by its id: its pruner, and what distinguishes the methods of one pruner."""
    of_method: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_method.setdefault(row["method"], row)
    labels = {}
    for method, row in of_method.items():
        namesakes = [other for other in of_method.values() if other["pruner"] == row["pruner"]]
        differing = {part for part in (*_PARTS, *_SETTINGS) if len({other.get(part) for other in namesakes}) > 1}
        given = [part for part in (*_PARTS, *_SETTINGS) if part in differing and row.get(part) not in (None, "none")]
        words = [f"{part}={row[part]}" if part in _SETTINGS else str(row[part]) for part in given]
        labels[method] = ", ".join([row["pruner"], *words])
    number = Counter(labels.values())
    return {
        method: label if number[label] == 1 else f"{label}, {method.rpartition('-')[2]}"
        for method, label in labels.items()
    }


def _entry(found: Sequence[float] | None) -> str:
    if not found:
        return "-" if found is None else "not trained"
    return f"{fmean(found):.2f}" + (f" ± {stdev(found):.2f}" if len(found) > 1 else "")
