"""How long threads that wait for each other spin: OpenMP reads it when torch is imported, so it must be set before."""

import subprocess
import sys

import pytest
from processes import ROOT

START = (
    "import os, sys; from pai_bench.launch.terminal import start_process; start_process();"
    "assert 'torch' not in sys.modules;"
    "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'), os.environ.get('OMP_NUM_THREADS'))"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000 None None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None None"),
        ({"OMP_WAIT_POLICY": "passive"}, "None passive None"),
        ({"OMP_NUM_THREADS": "3"}, "1000 None 3"),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START], env={"PYTHONPATH": str(ROOT)} | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected.split()
