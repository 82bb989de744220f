"""One process owns a run directory at a time, and damaged records hold nobody up."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TWO_RUNS, RunCli, composed
from processes import in_child
from whole_runs import RUNS, TINY, config_of

from pai_bench.data import locks
from pai_bench.errors import ConfigError, OwnedError, UserError
from pai_bench.runs import checkpoint_file, ownership, status
from pai_bench.runs.attempt import attempt
from pai_bench.runs.directory import RunDirectory

# Ownership ------------------------------------------------------------------------------------------------------------


def test_a_second_process_says_who_holds_the_run(run_cli: RunCli, tmp_path: Path) -> None:
    directory = tmp_path / "results" / composed_id(tmp_path)
    directory.mkdir(parents=True)
    claim = ownership.Claim(directory)
    done = run_cli(*TINY, *RUNS["synflow"])
    assert done.returncode == 6
    assert f"process {os.getpid()} on " in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in directory.iterdir()] == ["owner.json"]
    claim.release()
    assert run_cli(*TINY, *RUNS["synflow"]).returncode == 0


def composed_id(tmp_path: Path) -> str:

    return config_of("synflow", tmp_path).id


def test_the_claim_of_a_dead_process_is_taken_over_by_one_of_many(tmp_path: Path) -> None:
    pid = in_child(lambda: (ownership.Claim(tmp_path), os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(pid, 0)
    assert (tmp_path / "owner.json").exists()

    def claim() -> None:
        try:
            ownership.Claim(tmp_path)
        except OwnedError:
            os._exit(6)
        (tmp_path / f"won-{os.getpid()}").touch()
        end = time.monotonic() + 30
        while not (tmp_path / "all others have tried").exists() and time.monotonic() < end:
            time.sleep(0.01)

    children = {in_child(claim) for _ in range(12)}
    codes = []
    while children:
        pid, code = os.waitpid(-1, 0)
        children.discard(pid)
        codes.append(os.WEXITSTATUS(code))
        if len(codes) == 11:
            (tmp_path / "all others have tried").touch()
    assert codes == [6] * 11 + [0]
    assert len(list(tmp_path.glob("won-*"))) == 1


@pytest.mark.parametrize("ends", ["it releases its claim", "it dies"])
def test_a_claim_that_follows_one_found_dead_is_not_taken_for_it(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the first claim and its removal, its owner ends and another process claims the directory."""
    first = ownership.Claim(tmp_path)
    if ends == "it dies":
        content = json.loads(first.path.read_text())
        first.path.write_text(json.dumps(content | {"pid": 2**22 + 1}))
    others: list[ownership.Claim] = []
    real = ownership.Claim._alive

    def alive(self: ownership.Claim, *found: Any) -> bool:
        monkeypatch.setattr(ownership.Claim, "_alive", real)
        if ends == "it releases its claim":
            first.release()
        answer = real(self, *found)
        others.append(ownership.Claim(tmp_path))
        return answer

    monkeypatch.setattr(ownership.Claim, "_alive", alive)
    with pytest.raises(OwnedError, match="has been running it since"):
        ownership.Claim(tmp_path)
    assert not others[0].taken()
    others[0].release()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_from_another_machine_holds_while_its_heart_beats(tmp_path: Path) -> None:
    claim = ownership.Claim(tmp_path, heartbeat_seconds=0.1, dead_after_seconds=1.5)
    content = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(content | {"host": "elsewhere", "machine": "elsewhere"}))
    time.sleep(2.0)  # longer than it takes to be dead, but the heart beats
    with pytest.raises(OwnedError, match=r"process \d+ on elsewhere has been running it since"):
        ownership.Claim(tmp_path, dead_after_seconds=1.5)
    claim._stop.set()
    time.sleep(1.8)
    other = ownership.Claim(tmp_path, dead_after_seconds=1.5)
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_who_has_lost_the_claim_notices_and_leaves_the_files_alone(tmp_path: Path) -> None:
    claim = ownership.Claim(tmp_path, heartbeat_seconds=0.05)
    (tmp_path / "owner.json").write_text(json.dumps({"host": "elsewhere", "token": "theirs"}))
    time.sleep(0.5)
    assert claim.lost
    claim.release()
    assert (tmp_path / "owner.json").exists()


def test_a_process_of_another_container_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    """Its host may have our name, and its process id belong to nobody here."""
    ownership.Claim(tmp_path)
    content = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(content | {"machine": "another", "pid": 2**22 + 1}))
    with pytest.raises(OwnedError):
        ownership.Claim(tmp_path)


def test_a_requeued_job_takes_over_from_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    ownership.Claim(tmp_path)
    content = json.loads((tmp_path / "owner.json").read_text())
    (tmp_path / "owner.json").write_text(json.dumps(content | {"host": "node1", "machine": "node1"}))
    with pytest.raises(OwnedError):
        ownership.Claim(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ownership.Claim(tmp_path).release()


def test_a_file_system_that_stalls_does_not_lose_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunDirectory(tmp_path / "run")
    claim = ownership.Claim(tmp_path, heartbeat_seconds=0.05)

    def stale(self: Path, *_: Any, **__: Any) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", stale)
        time.sleep(0.3)
        files.save_checkpoint({})
    assert not claim.lost
    claim.release()
    assert files.path.joinpath("checkpoint.pt").is_file()
    (files.path / "owner.json").write_text(json.dumps({"token": "theirs"}))
    with pytest.raises(OwnedError, match="has taken this run over"):
        files.save_checkpoint({})


def test_a_checkpoint_beyond_the_end_of_its_curve_is_passed_over(tmp_path: Path) -> None:
    """A machine that crashed may have lost the end of the curve."""
    (tmp_path / "curve.jsonl").write_text('{"epoch": 1.0}\n' * 2)
    checkpoint_file.save_checkpoint(tmp_path, {}, curve_bytes=15)
    checkpoint_file.save_checkpoint(tmp_path, {}, curve_bytes=45)
    loaded = checkpoint_file.load_checkpoint(tmp_path)
    assert loaded is not None and loaded["curve_bytes"] == 15


@pytest.mark.parametrize("file", ["config.yaml", "queued.json"])
def test_a_job_may_begin_while_it_is_written_down_as_queued(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    flush = os.fsync

    def begins(descriptor: int) -> None:
        flush(descriptor)
        if not begun and list(tmp_path.glob(f"{file}.tmp-*")):
            begun.append(None)
            begun.append(RunDirectory(tmp_path))

    monkeypatch.setattr(os, "fsync", begins)
    status.mark_queued(tmp_path, "12_3", time.time() - 1, "seed: 0\n")
    assert begun and status.state(tmp_path).name == "running"
    assert not list(tmp_path.glob("queued.json*")) and not list(tmp_path.glob("config.yaml*"))
    begun[1].close()


def claim_of_a_dead_process(directory: Path) -> str:
    """Leaves the claim file of a process that is gone, and returns what it holds."""
    os.waitpid(in_child(lambda: (ownership.Claim(directory), os.kill(os.getpid(), signal.SIGKILL))), 0)
    return (directory / "owner.json").read_text()


def test_who_dies_while_it_clears_a_dead_claim_holds_nobody_up(tmp_path: Path) -> None:
    token = json.loads(claim_of_a_dead_process(tmp_path))["token"]
    other = tmp_path / "other"
    other.mkdir()
    left = claim_of_a_dead_process(other)
    (tmp_path / f"owner.json.{token}.cleared").write_text(left)
    # Who cleared that one has died over it, too.
    (tmp_path / f"owner.json.{json.loads(left)['token']}.cleared").write_text(claim_of_a_dead_process(other))
    started = time.monotonic()
    ownership.Claim(tmp_path).release()
    assert time.monotonic() - started < 5
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_who_lives_and_clears_a_dead_claim_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = json.loads(claim_of_a_dead_process(tmp_path))["token"]
    other = tmp_path / "other"
    other.mkdir()
    ownership.Claim(other).path.rename(tmp_path / f"owner.json.{token}.cleared")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OwnedError, match="try again"):
        ownership.Claim(tmp_path)


def test_files_of_processes_that_died_over_a_claim_are_removed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    left = claim_of_a_dead_process(other)
    for name in ("owner.json.tmp-0123456789abcdef", "owner.json.fedcba9876543210.cleared"):
        (tmp_path / name).write_text(left)
    torn = tmp_path / "owner.json.tmp-0011223344556677"
    torn.touch()
    os.utime(torn, (0, 0))
    (tmp_path / "owner.json.tmp-7766554433221100").touch()  # being written now
    claim = ownership.Claim(tmp_path)
    assert {path.name for path in tmp_path.glob("owner*")} == {"owner.json", "owner.json.tmp-7766554433221100"}
    claim.release()


# Damaged records ------------------------------------------------------------------------------------------------------

DAMAGE = {
    "cut": b'{"id": "x", "test_t', "empty": b"", "a list": b"[]", "another dictionary": b"{}", "a number": b"7",
    "null": b"null", "garbage": b"\x00\xff\xfe\x80", "deep": b"[" * 100_000, "odd values": b'{"id": 1, "state": 2}',
}  # fmt: skip


RECORDS = ("result.json", "status.json", "queued.json", "owner.json", "curve.jsonl")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_named_and_holds_no_run_up(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = RunDirectory(tmp_path / "run")
    first.record({"test_top1": 0.5}, 1.0)
    first.save_checkpoint({"a": torch.ones(1)})
    first.close()
    path = tmp_path / "run" / name
    path.write_bytes((DAMAGE[kind] + b" " * 100)[:100] if name == "curve.jsonl" else DAMAGE[kind])
    os.utime(path, (0, 0))
    assert status.finished(path.parent) is None
    found = status.state(path.parent)
    if name in ("result.json", "status.json", "queued.json"):
        assert found.name == "broken" and found.error is not None and found.error.startswith(f"{path}: it is damaged")
    else:
        assert found.name == "killed"
    caplog.clear()
    second = RunDirectory(path.parent)
    assert (second.checkpoint is None) == (name == "curve.jsonl")
    second.finish({"id": "run", "test_top1": 0.5, "sparsity": 0.0})
    second.close()
    assert status.state(path.parent).name == "finished"
    if name in ("result.json", "status.json", "curve.jsonl"):
        assert f"{path}: it is damaged" in caplog.text or f"{path} is damaged" in caplog.text
    if name == "result.json":
        assert path.with_name("result.json.damaged").read_bytes() == DAMAGE[kind]


def test_a_checkpoint_of_something_else_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("this", "other"):
        (tmp_path / name).mkdir()
        checkpoint_file.save_checkpoint(tmp_path / name, {"a": 1})
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "this" / "checkpoint.pt")
    assert checkpoint_file.load_checkpoint(tmp_path / "this") is None
    assert "it is a checkpoint of another run, other" in caplog.text
    torch.save({"state": torch.ones(1)}, tmp_path / "this" / "checkpoint.pt")
    assert checkpoint_file.load_checkpoint(tmp_path / "this") is None


@pytest.mark.parametrize("fault", ["no pickle", "no checkpoint", "another version", "no memory"])
def test_a_whole_checkpoint_that_cannot_be_loaded_stays(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    first = RunDirectory(path.parent)
    first.save_checkpoint({"a": torch.ones(1)})
    first.close()
    payloads = {"no pickle": b"no pickle", "no checkpoint": pickle.dumps([1, 2])}
    if fault in payloads:
        payload = payloads[fault]
        path.write_bytes(checkpoint_file.MAGIC + hashlib.sha256(payload).digest() + payload)
    elif fault == "another version":
        path.write_bytes(path.read_bytes().replace(checkpoint_file.MAGIC, b"pai_bench checkpoint 3\n"))
    else:
        monkeypatch.setattr(torch, "load", lambda *_, **__: raised(MemoryError()))
    content = path.read_bytes()
    said = "another version of pai_bench" if fault == "another version" else "it is whole but cannot be loaded"
    with pytest.raises(UserError, match=f"^{path}: {said}"):
        RunDirectory(path.parent)
    assert path.read_bytes() == content and not ownership.claimed(path.parent)


def raised(error: BaseException) -> None:
    raise error


def test_a_refusal_keeps_a_run_that_has_its_earlier_checkpoint_alone(tmp_path: Path) -> None:
    """As where it was killed while it wrote the next one."""
    config = composed("pruner=snip", "sparsity=0.5", f"results_dir={tmp_path}")
    first = RunDirectory(config.directory)
    first.save_checkpoint({"a": torch.ones(1)})
    first.close()
    (config.directory / "checkpoint.pt").rename(config.directory / "checkpoint.previous.pt")
    second = RunDirectory(config.directory)
    assert second.checkpoint is not None
    with pytest.raises(ConfigError, match="unreadable"), attempt(config, torch.device("cpu"), second):
        raise ConfigError("unreadable")
    second.close()
    assert (config.directory / "checkpoint.previous.pt").is_file()


def test_a_refusal_is_told_although_the_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps the name of a file that is open somewhere."""
    config = composed("pruner=snip", "sparsity=0.5", f"results_dir={tmp_path}")
    directory = RunDirectory(config.directory)
    monkeypatch.setattr(shutil, "rmtree", lambda path: raised(OSError(39, "Directory not empty", str(path))))
    with pytest.raises(ConfigError, match="unreadable"), attempt(config, torch.device("cpu"), directory):
        raise ConfigError("unreadable")
    directory.close()


def test_a_sweep_counts_a_run_whose_records_are_damaged(run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli(*TWO_RUNS).returncode == 0
    first, second = sorted((tmp_path / "results").glob("[!.]*"))
    (first / "result.json").write_bytes(b'{"id": "cut')
    asked = [sys.executable, str(ROOT / "scripts" / "status.py"), str(tmp_path / "results")]
    said = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert said.returncode == 1 and "2 runs: 1 finished, 1 broken" in said.stdout
    assert f"{first / 'result.json'}: it is damaged" in said.stdout
    (second / "result.json").unlink()
    (second / "config.yaml").write_bytes(b"\x00: [")
    retried = subprocess.run([*asked, "--retry"], capture_output=True, text=True, check=False)
    assert f"{second / 'config.yaml'}: it is damaged" in retried.stdout and retried.returncode == 4, retried.stderr
    assert f"{first / 'result.json'} is damaged, and is now result.json.damaged" in retried.stdout
    (first / "result.json").write_bytes(b"[]")
    again = run_cli(*TWO_RUNS)
    assert again.returncode == 0 and "2 done, 0 skipped, 0 failed" in again.stdout, again.stderr


def test_what_dead_processes_had_begun_to_decode_is_removed(tmp_path: Path) -> None:
    for name in ("dead.1-32-abc", "busy-32-def"):
        (tmp_path / f"{name}.building").mkdir()
        (tmp_path / f"{name}.building" / "train.npy").touch()
    with locks.lock(tmp_path, "busy-32-def"):
        locks.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.glob("*.building")] == ["busy-32-def.building"]
