"""A paper as a file: how its numbers are read, and mistakes that are refused in one line."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from pai_bench.errors import ConfigError
from pai_bench.published import numbers, pages
from pai_bench.published.matching import Recipes

HEAD = """
paper: "Somebody 2030: a paper"
tables:
  - name: Table 1
    quantity: test_top1
    num_runs: 5
    evidence: V
    source: page 3
    recipe: [training.epochs=7]
"""
PAPER = f"""{HEAD}    across: sparsity
    values: |
      dataset, model, pruner, allocation, 0, 0.9
      digits, resnet20, snip, uniform, , 97.3±0.4
"""


def test_a_paper_is_added_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "somebody.yaml").write_text(PAPER)
    (number,) = numbers.read(tmp_path)
    assert number.settings == {"dataset": "digits", "model": "resnet20", "pruner": "snip", "allocation": "uniform"}
    assert (number.value, number.sd, number.num_runs) == (pytest.approx(0.973), pytest.approx(0.004), 5)
    assert number.density == pytest.approx(0.1) and number.rounding == pytest.approx(0.0005)
    cfg = Recipes().of(number)
    assert cfg.training.epochs == 7 and cfg.allocation.name == "uniform"


def test_the_page_on_published_numbers_tells_the_truth(tmp_path: Path) -> None:
    """Its example is a paper, and its tables list what there is."""
    page = (ROOT / "docs" / "published.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert example
    (tmp_path / "somebody.yaml").write_text(example[1])
    found = numbers.read(tmp_path)
    assert [n.value for n in found] == pytest.approx([0.936, 0.921, 0.909, 0.894])
    assert Recipes().of(found[1]).allocation.name == "uniform"
    listed = set(re.findall(r"^\| `?([A-Za-z_0-9 ]+?)`? \|", page, re.M))
    assert listed - {"verdict", "quantity", "evidence", "option"} == {
        *numbers.QUANTITIES,
        *numbers.EVIDENCE,
        *pages.ORDER,
    }


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tables:", "table:", "there is no such entry"),
        ('paper: "Somebody 2030: a paper"', "", "paper is missing"),
        ("source: page 3", "", "source is missing"),
        ("evidence: V", "evidence: X", "evidence=X: give one of V"),
        ("quantity: test_top1", "quantity: top1", "quantity=top1: give one of test_top1"),
        ("num_runs: 5", "num_runs: 0", "num_runs=0: give 1 or more"),
        ("recipe: [training.epochs=7]", "", "either recipe or no_recipe"),
        ("source: page 3", "source: page 3\n    tolerance: {absolute: 1}", "tolerance"),
        ("across: sparsity", "across: compression", "compression=0.9 leaves nothing"),
        ("across: sparsity", "", "the one called value"),
        ("97.3±0.4", "973±0.4", "no accuracy in percent"),
        ("97.3±0.4", "97.3+-0.4", "no number"),
        ("97.3±0.4", "97.3, 1", "has 7 cells, its header 6"),
        ("digits, resnet20", "digits, ", "model is missing"),
        ("tables:", "tables: [", "cannot be read"),
        ("- name", "- nane", "nane: there is no such entry"),
        ("recipe: [training.epochs=7]", "recipe: training.epochs=7", "recipe=training.epochs=7: give a list"),
        ("source: page 3", "source: 3", "source=3: put it in quotes"),
        ("tables:", "arxiv: 2006.05467\ntables:", "arxiv=2006.05467: put it in quotes"),
        ("97.3±0.4", "97.3±-0.4", "no number"),
        ("across: sparsity", "across: schedule.levels", "needs one target"),
        ("allocation, 0", "layer, 0", "layer=uniform"),
        ("quantity: test_top1", "quantity: layer_density\n    tolerance: {absolute: 0.1}", "needs a layer"),
        ("quantity: test_top1", "quantity: multiply_adds\n    tolerance: {absolute: -1}", "of 0 or more"),
        ("quantity: test_top1", "quantity: critical_compression\n    tolerance: {absolute: 1}", "has a target"),
    ],
)
def test_a_paper_with_a_mistake_is_refused_in_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "somebody.yaml"
    assert old in PAPER
    path.write_text(PAPER.replace(old, new, 1))
    with pytest.raises(ConfigError, match=says) as caught:
        numbers.read(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_that_does_not_compose_is_named(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "somebody.yaml").write_text(PAPER.replace("training.epochs=7", "training.epoch=7"))
    (number,) = numbers.read(tmp_path / "papers")
    with pytest.raises(Exception, match="epoch") as caught:
        Recipes().of(number)
    assert "somebody, Table 1" in caught.value.__notes__[0]


# Tables in files ------------------------------------------------------------------------------------------------------

IN_A_FILE = f"{HEAD}    file: table.csv\n"
CELLS = """dataset,model,pruner,schedule.levels,sparsity,value,sd,num_runs
digits,resnet20,snip,,0.9,97.3,0.4,9
digits,resnet20,snip,2,0.95,96.25,,
"""


def test_a_line_can_have_a_spread_and_a_number_of_runs_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "somebody.yaml").write_text(IN_A_FILE)
    (tmp_path / "table.csv").write_text(CELLS)
    first, second = numbers.read(tmp_path)
    assert (first.value, first.sd, first.num_runs) == (pytest.approx(0.973), pytest.approx(0.004), 9)
    assert (second.value, second.sd, second.num_runs) == (pytest.approx(0.9625), None, 5)
    assert first.rounding == pytest.approx(5e-4) and second.rounding == pytest.approx(5e-5)
    assert second.settings == {"dataset": "digits", "model": "resnet20", "pruner": "snip", "schedule.levels": "2"}


def test_a_table_in_a_file_is_the_table_in_the_yaml(tmp_path: Path) -> None:
    wide = "dataset, model, pruner, 0.9, 0.95\ndigits, resnet20, snip, 97.3±0.4,\ndigits, resnet20, random, 90, 80\n"
    inline = "".join(f"      {line}\n" for line in wide.splitlines())
    for name, text in {
        "inside": IN_A_FILE.replace("file: table.csv", "across: sparsity\n    values: |\n") + inline,
        "beside": IN_A_FILE.replace("file:", "across: sparsity\n    file:"),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "somebody.yaml").write_text(text)
    (tmp_path / "beside" / "table.csv").write_text(wide)
    inside, beside = numbers.read(tmp_path / "inside"), numbers.read(tmp_path / "beside")
    assert inside == beside and len(inside) == 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("97.3,0.4,9", "97.3,0.4", "has 7 cells, its header 8"),
        ("97.3,0.4,9", "973,0.4,9", "no accuracy in percent"),
        ("97.3,0.4,9", ",0.4,9", "is no number"),
        ("97.3,0.4,9", "97.3,-0.4,9", "is no number"),
        ("97.3,0.4,9", "97.3±0.4,0.4,9", "is no number"),
        ("97.3,0.4,9", "97.3,0.4,0", "num_runs=0: give 1 or more"),
        ("97.3,0.4,9", "97.3,0.4,many", "num_runs=many: give 1 or more"),
        ("97.3,0.4,9", '97.3,0.4,"9', "cells cannot be told apart"),
        ("value,sd,num_runs", "value,num_runs,sd", "the one called value, and sd and num_runs after it"),
        ("value,sd,num_runs", "value,sd,spread", "the one called value, and sd and num_runs after it"),
        ("value,sd,num_runs", "value,sd,sd", "the one called value, and sd and num_runs after it"),
        ("dataset,model", "dataset,dataset", "names a column twice"),
        ("sparsity", "sparseness", "needs one target"),
        ("0.9,97.3", "1.9,97.3", "sparsity=1.9 leaves nothing"),
        (CELLS, "", "a line of names and a line of numbers"),
        (CELLS, "dataset,model\ndigits,resnet20\n", "no columns of numbers"),
    ],
)
def test_a_mistake_in_a_file_of_numbers_is_told_in_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "somebody.yaml").write_text(IN_A_FILE)
    assert old in CELLS
    (tmp_path / "table.csv").write_text(CELLS.replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        numbers.read(tmp_path)
    said = str(caught.value)
    assert f"{tmp_path / 'somebody.yaml'}: Table 1: file=table.csv: " in said and "\n" not in said


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("file: none.csv", "file=none.csv: it cannot be read"),
        ("file: latin.csv", "file=latin.csv: it cannot be read"),
        ("file: ../table.csv", "file=../table.csv: give the name of a file that lies beside this one"),
        ("file: table.csv\n    values: a", "give either values or file"),
        ("note: nothing", "give either values or file"),
        ("file: 3", "file=3: put it in quotes"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(entry: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "somebody.yaml").write_text(IN_A_FILE.replace("file: table.csv", entry))
    (tmp_path / "table.csv").write_text(CELLS)
    (tmp_path / "latin.csv").write_bytes(CELLS.replace("97.3", "97.3±").encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        numbers.read(tmp_path)
    assert "\n" not in str(caught.value)
