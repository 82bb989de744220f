"""The real W&B client against a server: one run for each run, whatever happens to the process or the network."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, RunCli, composed
from safetensors.torch import load_file
from wandb_server import Server
from whole_runs import RUNS, TINY, directory_of

from pai_bench.errors import ConfigError
from pai_bench.runs import wandb_run
from pai_bench.runs.wandb_run import fitting

ONLINE = [*[word for word in TINY if not word.startswith("tracker")], "tracker=wandb"]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


def epochs(lines: list[dict[str, Any]], key: str = "test_top1") -> list[float]:
    return [line["epoch"] for line in lines if key in line]


def local(results: Path) -> list[float]:
    """The epochs in the curve of the only run."""
    path = next(results.glob("*/curve.jsonl"), None)
    return epochs([json.loads(line) for line in path.read_text().splitlines()]) if path else []


def runs_in(folder: Path) -> list[Path]:
    """The directories of runs; the cache beside them is none."""
    return sorted(path.parent for path in (folder / "results").glob("*/config.yaml"))


def test_a_sweep_in_reused_workers_is_one_run_each(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    launcher = ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    done = run_cli("-m", *launcher, *ONLINE, "pruner=snip", "sparsity=0.5", "seed=range(4)", env=server.env)
    assert done.returncode == 0 and "4 done, 0 skipped, 0 failed" in done.stdout, done.stderr
    names = {path.name for path in runs_in(tmp_path)}
    assert set(server.runs) == set(server.history) == names
    assert server.exit_codes == {name: [0] for name in names}
    for name in names:
        row = json.loads((tmp_path / "results" / name / "result.json").read_text())
        assert epochs(server.history[name]) == [0, 1, 2]
        assert server.runs[name]["summary"]["test_top1"] == row["test_top1"]
        assert server.runs[name]["config"]["seed"]["value"] == row["seed"]
        assert server.runs[name]["groupName"] == row["group"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_taken_up_again_goes_on_as_one(number: signal.Signals, server: Server, tmp_path: Path) -> None:
    results = tmp_path / "results"
    long = [word for word in ONLINE if "epochs=2" not in word] + ["training.epochs=30", "checkpoint_epochs=7"]
    command = [sys.executable, str(ROOT / "run.py"), *long, *RUNS["synflow"], f"results_dir={results}"]
    env = os.environ | server.env | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(local(results)) < 12:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (75 if number == signal.SIGTERM else -number), said
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0 and "going on from a checkpoint" in again.stdout, again.stderr
    name = directory_of(results).name
    assert epochs(server.history[name]) == local(results) == list(range(31))
    if number == signal.SIGTERM:
        assert name in server.preempting and server.exit_codes[name] == [75, 0]


def test_a_wrong_key_ends_no_run(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    server.refuse = True
    done = run_cli(*ONLINE, "pruner=snip", "sparsity=0.5", env=server.env)
    assert done.returncode == 0, done.stderr
    assert "going offline" in done.stdout
    assert list(directory_of(tmp_path / "results").glob("wandb/offline-run-*"))


def test_a_network_that_goes_away_ends_no_run_and_keeps_it_no_longer_than_allowed(tmp_path: Path) -> None:
    server = Server()
    long = [word for word in ONLINE if "epochs=2" not in word] + ["training.epochs=12", "tracker.timeout_seconds=3"]
    command = [sys.executable, str(ROOT / "run.py"), *long, *RUNS["synflow"], f"results_dir={tmp_path}"]
    env = os.environ | server.env | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not server.history:
        time.sleep(0.02)
    server.stop()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    curve = [json.loads(line) for line in (directory_of(tmp_path) / "curve.jsonl").read_text().splitlines()]
    assert epochs(curve) == list(range(13))


def sync(folder: Path, server: Server, *settings: str) -> "subprocess.CompletedProcess[str]":
    """What scripts/sync.py does with a folder, where the environment says offline, as clusters set it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sync.py"), str(folder), *settings],
        env=os.environ | server.env | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_runs_are_sent_later_from_their_directories(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    done = run_cli("-m", *TINY, "pruner=snip,magnitude", "sparsity=0.5")
    assert done.returncode == 0, done.stderr
    for _ in range(2):  # once more makes no difference
        server.history.clear()
        sent = sync(tmp_path / "results", server, "tracker.project=new")
        assert sent.returncode == 0, sent.stderr
        assert len(server.history) == 2
        for directory in runs_in(tmp_path):
            curve = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
            assert epochs(server.history[directory.name]) == epochs(curve) == [0, 1, 2]
            assert server.runs[directory.name]["project"] == "new"
            row = json.loads((directory / "result.json").read_text())
            assert server.runs[directory.name]["summary"]["test_top1"] == row["test_top1"]


def test_what_could_not_be_sent_is_said(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    assert run_cli(*TINY, "pruner=snip", "sparsity=0.5").returncode == 0
    server.refuse = True
    sent = sync(tmp_path / "results", server)
    assert sent.returncode == 1
    assert "NOT SENT" in sent.stdout and "error: 1 of 1 runs was not sent" in sent.stderr


def test_names_are_brought_into_the_form_that_wandb_takes() -> None:
    long = "a" * 80
    tag = fitting(long, 64)
    assert len(tag) == 64 and tag != fitting(long + "b", 64)
    assert fitting("mask-images of flowers/50%:ä") == "mask-images_of_flowers_50___"
    assert fitting("digits-lenet300_1.5") == "digits-lenet300_1.5"


def test_a_dataset_with_a_long_name_has_its_record(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    name = "flowers of " + 60 * "b"
    done = run_cli(
        "model=lenet300",
        "training.epochs=1",
        "pruner=magnitude",
        "sparsity=0.5",
        "dataset.validation=0.1",
        f"dataset.name='{name}'",
        env=server.env,
    )
    assert done.returncode == 0 and "cannot start" not in done.stdout, done.stdout + done.stderr
    (run,) = server.runs.values()
    assert all(len(tag) <= 64 for tag in run["tags"]) and run["summary"]["dataset"] == name


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["tracker.mode=onlien"], {}, "tracker.mode=onlien: give one of online, offline, disabled"),
        ([], {"WANDB_MODE": "onlien"}, "WANDB_MODE=onlien: give online, offline or disabled"),
        (["tracker.project=a/b"], {}, "tracker.project=a/b: give 1 to 128 characters"),
        (["tracker.project=''"], {}, "tracker.project=: give a text"),
        ([], {"WANDB_PROJECT": "a/b"}, "WANDB_PROJECT=a/b: give 1 to 128 characters"),
        (["tracker.entity='my team?'"], {}, r"tracker.entity=my team\?: give 1 to 128 characters"),
    ],
)
def test_a_mode_or_project_that_cannot_be_is_refused(
    words: list[str], env: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("WANDB_MODE",):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=said):
        composed("tracker=wandb", *words, f"seed={len(said)}")


@pytest.mark.parametrize(
    ("given", "of_environment", "project"),
    [(None, None, "pai-bench"), (None, "", "pai-bench"), (None, "thesis", "thesis"), ("own", "thesis", "own")],
)
def test_the_project_of_the_environment_is_the_default(
    given: str | None, of_environment: str | None, project: str, run_cli: RunCli, tmp_path: Path
) -> None:
    env = {"WANDB_MODE": "offline"} | ({} if of_environment is None else {"WANDB_PROJECT": of_environment})
    words = [*TINY, "tracker=wandb", "pruner=magnitude", "sparsity=0.5", "training.epochs=0"]
    done = run_cli(*words, *([] if given is None else [f"tracker.project={given}"]), env=env)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("results/*/wandb/offline-run-*/*.wandb")
    assert project.encode() in record.read_bytes()


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_key_is_found_where_the_client_finds_it(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for variable, file in (("HOME", ".netrc"), ("NETRC", "keys")):
        path = tmp_path / file
        path.write_text("machine api.wandb.ai login user password 0123456789\n")
        path.chmod(mode)
        monkeypatch.setenv(variable, str(tmp_path if variable == "HOME" else path))
        assert wandb_run._has_key("api.wandb.ai") and not wandb_run._has_key("elsewhere")
        path.unlink()


def test_an_agent_of_a_sweep_that_names_the_run_otherwise_is_told_and_kept(run_cli: RunCli, tmp_path: Path) -> None:
    agent = {"WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "xyz", "WANDB_MODE": "offline"}
    done = run_cli("model=lenet300", "training.epochs=1", "pruner=magnitude", "sparsity=0.5", env=agent)
    assert done.returncode == 0 and "W&B calls this run xyz" in done.stdout, done.stdout + done.stderr
    assert "the agent of a W&B sweep sees no run that is offline; give tracker.mode=online" in done.stdout
    kept = json.loads((directory_of(tmp_path / "results") / "wandb.json").read_text())
    assert kept == {"id": "xyz", "sweep": "abc"}


def test_a_damaged_run_keeps_no_other_from_being_sent(run_cli: RunCli, server: Server, tmp_path: Path) -> None:
    done = run_cli(
        "-m", "model=lenet300", "training.epochs=1", "tracker=none", "pruner=magnitude", "sparsity=0.5", "seed=range(4)"
    )
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = runs_in(tmp_path)
    (first / "result.json").write_text("[]")
    (second / "curve.jsonl").write_bytes(b"\x00[")
    (third / "config.yaml").write_bytes(b"\x00: [")
    sent = sync(tmp_path / "results", server)
    assert sent.returncode == 4 and "error: 3 of 4 runs were not sent" in sent.stderr, sent.stderr
    for path in (first / "result.json", second / "curve.jsonl", third / "config.yaml"):
        assert f"{path.parent.name}: NOT SENT, {path}: it " in sent.stdout
    assert list(server.runs) == [fourth.name]


SENT = ("config.yaml", "provenance.json", "mask.json", "result.json")


def told(server: Server, run: str) -> dict[str, Any]:
    """All that a server knows of a run, but for times, and for what the client says of itself."""
    of_run = server.runs[run]
    history = [{k: v for k, v in line.items() if not k.startswith("_")} for line in server.history[run]]
    artifacts = [
        {
            "name": given["input"]["artifactCollectionName"],
            "digest": given["input"]["digest"],
            "aliases": {alias["alias"] for alias in given["input"]["aliases"]},
            "metadata": json.loads(given["input"]["metadata"]),
        }
        for given in server.artifacts
    ]
    return {
        "config": {key: value["value"] for key, value in of_run["config"].items() if key != "_wandb"},
        "summary": {key: value for key, value in of_run["summary"].items() if not key.startswith("_")},
        "tags": of_run["tags"],
        "group": of_run["groupName"],
        "history": history,
        "artifacts": artifacts,
        "files": {name: body for name, body in server.files[run].items() if name.startswith("pai_bench/")},
    }


def test_a_run_that_is_sent_later_is_the_run_that_was_sent_live(
    run_cli: RunCli, server: Server, tmp_path: Path
) -> None:
    words = [*ONLINE, "save_scores=true", "dataset.validation=0.1", "ablation=shuffle_mask"]
    done = run_cli(*words, "experiment=digits_baselines", "pruner=snip", "compression=10", "seed=0", env=server.env)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = directory_of(tmp_path / "results")
    live = told(server, directory.name)
    row = json.loads((directory / "result.json").read_text())
    assert live["tags"] == ["digits", row["model"], "snip", "one_shot", "shuffle_mask", "digits_baselines"]
    assert row["experiment"] == live["config"]["experiment"] == "digits_baselines"
    config, summary = live["config"], live["summary"]
    assert (config["sparsity"], config["density"], config["compression"]) == (0.9, 0.1, pytest.approx(10))
    assert (summary["sparsity"], summary["num_kept"]) == (row["sparsity"], row["num_kept"])
    assert not {"num_kept", "num_prunable", "rounds", "tracker"} & set(config)
    origin = json.loads((directory / "provenance.json").read_text())
    assert config["provenance"] == origin and origin["host"] and origin["versions"]["torch"]
    assert not [key for key in (*summary, *live["history"][-1]) if key.replace("/", "_") != key and "top1" in key]
    assert set(live["files"]) == {f"pai_bench/{name}" for name in SENT}
    assert all(body == (directory / name.partition("/")[2]).read_bytes() for name, body in live["files"].items())
    (artifact,) = live["artifacts"]
    assert (artifact["name"], artifact["aliases"]) == (f"mask-{row['group']}", {"latest", "seed-0"})
    assert (artifact["metadata"]["run"], artifact["metadata"]["seed"]) == (row["id"], 0)
    assert artifact["metadata"]["pruner"] == "snip" and artifact["metadata"]["sparsity"] == 0.9
    densities = [layer["density"] for layer in json.loads((directory / "mask.json").read_text())["layers"]]
    assert [line["mask/density"] for line in live["history"] if "mask/density" in line] == densities
    assert [sum(line["mask/scores_log10"]["values"]) for line in live["history"] if "mask/scores_log10" in line] == [
        sum(int((scores != 0).sum()) for scores in load_file(directory / "scores.safetensors").values())
    ]
    later = Server()
    try:
        sent = sync(tmp_path / "results", later)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert told(later, directory.name) == live
    finally:
        later.stop()


def test_an_agent_gets_the_result_of_every_trial_even_if_it_was_known_before(server: Server, tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "validation_top1", "goal": "maximize"}
    sweep["command"] += ["model=lenet300", "training.epochs=1", f"results_dir={tmp_path / 'results'}", "data_dir=none"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    server.trials = [{"training.lr": 0.1, "training.weight_decay": 1e-4}] * 2
    folder = Path(sys.executable).parent
    env = os.environ | server.env | {"OMP_NUM_THREADS": "1", "PATH": f"{folder}:{os.environ['PATH']}"}
    env |= {"WANDB_DIR": str(tmp_path), "WANDB_PROJECT": "pai-bench", "WANDB_ENTITY": "test"}
    for words in (["sweep", str(tmp_path / "sweep.yaml")], ["agent", "--count", "2", "test/pai-bench/sweep1"]):
        command = [sys.executable, "-m", "wandb", *words]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (directory,) = runs_in(tmp_path)
    row = json.loads((directory / "result.json").read_text())
    assert set(server.runs) == {"trial1", "trial0"}, done.stdout + done.stderr
    for name in ("trial1", "trial0"):
        assert server.runs[name]["summary"]["validation_top1"] == row["validation_top1"]
        assert server.runs[name]["config"]["training"]["value"]["lr"] == 0.1
        assert epochs(server.history[name]) == [0, 1]
        assert server.exit_codes[name] == [0]
