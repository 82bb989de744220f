"""Sends runs to Weights & Biases from their run directories, no matter what W&B has received before.

  pai-bench sync results
  pai-bench sync results/<run> tracker.project=thesis tracker.entity=lab

A run with the same id in the project is replaced, so you may repeat this. Running runs are left out. A damaged run does
not stop the others. The exit code is the worst one.
"""

import argparse
import os
import sys
from pathlib import Path

from pai_bench.errors import ConfigError, DataError, UserError
from pai_bench.launch import compose, terminal
from pai_bench.runs import status
from pai_bench.runs.replay import replay


def main() -> None:
    """Sends every run in a folder, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a results folder, or the directory of a run")
    parser.add_argument("settings", nargs="*", help="settings of the tracker, such as tracker.project=thesis")
    parser.add_argument("--trust", action="store_true", help="the runs may name functions of other packages")
    arguments = parser.parse_intermixed_args()
    terminal.start_process()
    with terminal.one_line_errors():
        for word in arguments.settings:
            if not word.lstrip("+~").startswith(("tracker.", "tracker=", "hydra.searchpath=")):
                raise ConfigError(f"{word}: it is no setting of the tracker, and no run is done again; leave it out")
        tracker = compose.compose(["tracker=wandb", "tracker.mode=online", *arguments.settings]).tracker
        folder = arguments.folder
        found = (
            [folder] if (folder / "config.yaml").is_file() else sorted(p.parent for p in folder.glob("*/config.yaml"))
        )
        if not found:
            raise DataError(f"{folder}: there are no runs; give a results folder or the directory of a run")
        os.environ["WANDB_MODE"] = "online"
        codes = []
        for directory in found:
            if status.state(directory).name == "running":
                print(f"{directory.name}: running, left out")
                continue
            try:
                sent = replay(directory, compose.stored(directory, tracker, arguments.trust), tracker)
                print(f"{directory.name}: {'sent' if sent else 'NOT SENT'}")
                codes += [] if sent else [UserError.exit_code]
            except UserError as error:
                print(f"{directory.name}: NOT SENT, {error}")
                codes.append(error.exit_code)
        if codes:
            were = "was" if len(codes) == 1 else "were"
            print(f"error: {len(codes)} of {len(found)} runs {were} not sent", file=sys.stderr)
            sys.exit(max(codes))
