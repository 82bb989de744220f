"""A results folder as one file: what is in it, and that tables, verdicts and the library read it like the folder."""

import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import pai_bench as pb
from pai_bench.commands import pack as command
from pai_bench.config.composition import read, rerunnable
from pai_bench.core import Call
from pai_bench.errors import ConfigError, DataError
from pai_bench.report.writing import Options, write
from pai_bench.runs import archive, status

WORDS = [
    "dataset=digits",
    "model=lenet300",
    "model.hidden=[8]",
    "training=digits",
    "training.epochs=1",
    "tracker=none",
    "pruner=snip",
    "sparsity=0.5",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, and what is left of a third."""
    folder = tmp_path_factory.mktemp("results")
    for seed in (0, 1):
        pb.run(*WORDS, f"seed={seed}", f"results_dir={folder}")
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("seed: 2\n")
    return folder


@pytest.fixture(scope="module")
def packed(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "results.tar.gz"
    assert archive.pack(results, file) == 2
    return file


def test_rows_configs_and_layers_are_those_of_the_folder(results: Path, packed: Path) -> None:
    with archive.opened(packed) as folder:
        assert status.read(folder) == status.read(results)
        for row in status.read(results):
            of, there = results / row["id"], folder / row["id"]
            files = ["config.yaml", "mask.json", "provenance.json", "result.json"]
            assert sorted(path.name for path in there.iterdir()) == files
            origin, packed_origin = (json.loads((one / "provenance.json").read_text()) for one in (of, there))
            assert origin.keys() - packed_origin.keys() == {"host", "platform", "command"}
            assert packed_origin.items() <= origin.items() and packed_origin["commit"]
            assert (there / "mask.json").read_bytes() == (of / "mask.json").read_bytes()
            config, packed_config = ((one / "config.yaml").read_text().splitlines() for one in (of, there))
            changed = [(old, new) for old, new in zip(config, packed_config, strict=True) if old != new]
            assert [new for _, new in changed] == ["results_dir: results"]
    assert not folder.exists()


def test_no_path_of_the_machine_is_left(results: Path, packed: Path) -> None:
    with tarfile.open(packed) as file:
        for entry in file:
            content = file.extractfile(entry)
            assert content is not None and str(results).encode() not in content.read()


def test_of_every_path_in_a_config_the_last_name_is_left(results: Path, tmp_path: Path) -> None:
    row = status.read(results)[0]
    run = read(results / row["id"] / "config.yaml")
    run.dataset.settings["root"] = "/home/me/images"
    run.model.settings["file"] = "/home/me/of_mine.csv"
    tracker = replace(run.tracker, settings={"project": "pruning", "entity": "me"})
    transfer = Call("pai_bench.pruning.transfers.signs", {"weights": "../me/signs.safetensors"}, "signs")
    given = replace(run, mask="me/mask.safetensors", weights="~/weights.pt", tracker=tracker, transfer=transfer)
    found = {}
    for key in ("mask", "file"):
        written = replace(given, allocation=Call("pai_bench.masks.budgets.of", {key: f"me/{key}.csv"}, "of"))
        shutil.copytree(results / row["id"], tmp_path / key / row["id"])
        (tmp_path / key / row["id"] / "config.yaml").write_text(rerunnable(written))
        archive.pack(tmp_path / key, tmp_path / f"{key}.tar.gz")
        with archive.opened(tmp_path / f"{key}.tar.gz") as folder:
            text = (folder / row["id"] / "config.yaml").read_text()
        assert "me/" not in text and "entity: null" in text and "project: pruning" in text
        found[key] = yaml.safe_load(text)
        assert found[key]["allocation"][key] == f"{key}.csv"
    names = found["mask"]
    assert (names["mask"], names["weights"], names["data_dir"]) == ("mask.safetensors", "weights.pt", "data")
    assert (names["dataset"]["root"], names["model"]["file"]) == ("images", "of_mine.csv")
    assert names["transfer"]["weights"] == "signs.safetensors"


def test_a_packed_config_is_of_the_same_run(results: Path, packed: Path) -> None:
    with archive.opened(packed) as folder:
        for row in status.read(results):
            assert read(folder / row["id"] / "config.yaml").id == row["id"]


def test_rows_that_were_packed_without_a_provenance_are_packed_again(results: Path, tmp_path: Path) -> None:
    for row in status.read(results):
        place = tmp_path / "unpacked" / row["id"]
        place.mkdir(parents=True)
        for name in ("config.yaml", "mask.json", "result.json"):
            (place / name).write_bytes((results / row["id"] / name).read_bytes())
    archive.pack(tmp_path / "unpacked", tmp_path / "again.tar.gz")
    with archive.opened(tmp_path / "again.tar.gz") as folder:
        assert status.read(folder) == status.read(results)


def test_the_same_runs_give_the_same_file(results: Path, packed: Path, tmp_path: Path) -> None:
    archive.pack(results, tmp_path / "again.tgz")
    assert (tmp_path / "again.tgz").read_bytes() == packed.read_bytes()


def test_curves_on_request(results: Path, tmp_path: Path) -> None:
    archive.pack(results, tmp_path / "curves.tar.gz", curves=True)
    with archive.opened(tmp_path / "curves.tar.gz") as folder:
        for row in status.read(results):
            assert (folder / row["id"] / "metrics.csv").read_bytes() == (
                results / row["id"] / "metrics.csv"
            ).read_bytes()


def test_a_report_is_that_of_the_folder(results: Path, packed: Path, tmp_path: Path) -> None:
    options = Options(figures=["accuracy"], images=False)
    write(results, tmp_path / "folder", options)
    report = write(packed, tmp_path / "file", options)
    assert report.num_runs == 2 and not report.problems
    (table,) = (tmp_path / "folder").glob("tables/*.md")
    assert (tmp_path / "file" / "tables" / table.name).read_text() == table.read_text()
    page = report.page.read_text()
    origin = json.loads((results / status.read(results)[0]["id"] / "provenance.json").read_text())
    assert "results.tar.gz" in page and f"Commit {origin['commit'][:12]}" in page
    assert "Commands of one run" not in page  # they are not packed


def test_figures_of_what_was_not_packed_are_left_out_in_one_line(results: Path, packed: Path, tmp_path: Path) -> None:
    report = write(packed, tmp_path / "file", Options(figures=["accuracy", "curves", "overlap"], images=False))
    assert report.problems == (
        f"the figures curves and overlap: {packed} was packed without metrics.csv and mask.safetensors",
    )
    archive.pack(results, tmp_path / "curves.tar.gz", curves=True)
    for of, place in ((results, "folder"), (tmp_path / "curves.tar.gz", "curves")):
        assert not write(of, tmp_path / place, Options(figures=["curves"], images=False)).problems
    curves = [(tmp_path / place / "curves.csv").read_text() for place in ("folder", "curves")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) > 1


def test_load_reads_it(results: Path, packed: Path) -> None:
    pytest.importorskip("pandas")
    assert list(pb.load(packed).id) == list(pb.load(results).id)


def test_the_command(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pai-bench pack", str(results), "-o", str(tmp_path / "two.tar.gz")])
    command.main()
    assert capsys.readouterr().out.startswith("2 runs packed: ")


@pytest.mark.parametrize("name", ["results.zip", "results"])
def test_a_wrong_name(results: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"it has to end in \.tar\.gz"):
        archive.pack(results, tmp_path / name)


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no finished runs"):
        archive.pack(tmp_path, tmp_path / "none.tar.gz")


def test_a_run_without_its_config(results: Path, tmp_path: Path) -> None:
    row = status.read(results)[0]
    (tmp_path / row["id"]).mkdir()
    (tmp_path / row["id"] / "result.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"config\.yaml: it cannot be read"):
        archive.pack(tmp_path, tmp_path / "one.tar.gz")


def test_a_run_with_a_damaged_config(results: Path, tmp_path: Path) -> None:
    row = status.read(results)[0]
    shutil.copytree(results / row["id"], tmp_path / row["id"])
    (tmp_path / row["id"] / "config.yaml").write_text("seed: [")
    with pytest.raises(DataError, match=r"config\.yaml: it cannot be read"):
        archive.pack(tmp_path, tmp_path / "one.tar.gz")


def test_a_damaged_file(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "half.tar.gz").write_bytes(packed.read_bytes()[:200])
    with pytest.raises(DataError, match="no archive of results"), archive.opened(tmp_path / "half.tar.gz"):
        pass


def test_a_file_with_one_wrong_bit_is_refused(packed: Path, tmp_path: Path) -> None:
    """Whatever it would change: tarfile alone stops in silence at a damaged head, and gives wrong rows elsewhere."""
    content, damaged = packed.read_bytes(), tmp_path / "damaged.tar.gz"
    for at in range(12, len(content), max(1, len(content) // 100)):
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(DataError, match="no archive of results"), archive.opened(damaged):
            pass


def test_a_damaged_origin_is_named(results: Path, tmp_path: Path) -> None:
    row = status.read(results)[0]
    shutil.copytree(results / row["id"], tmp_path / row["id"])
    for damage in ("{", "[]"):
        (tmp_path / row["id"] / "provenance.json").write_text(damage)
        with pytest.raises(DataError, match=r"provenance\.json: it is damaged .* remove this run, or run it again"):
            archive.pack(tmp_path, tmp_path / "one.tar.gz")


def test_a_run_in_two_directories_counts_once(results: Path, tmp_path: Path) -> None:
    row = status.read(results)[0]
    shutil.copytree(results / row["id"], tmp_path / "renamed")
    assert archive.pack(tmp_path, tmp_path / "one.tar.gz") == 1
    shutil.copytree(results / row["id"], tmp_path / row["id"])
    for use in (pb.load, lambda folder: archive.pack(folder, tmp_path / "two.tar.gz")):
        with pytest.raises(DataError, match=f"both hold the run {row['id']}; take one of the two away"):
            use(tmp_path)
