"""A finished run as a repository of the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

from pai_bench.config.composition import read, shareable
from pai_bench.config.schema import RunConfig
from pai_bench.errors import ConfigError, DataError, UserError, check_installed
from pai_bench.runs import status
from pai_bench.runs.summary import weights_again

FILES = ("model.safetensors", "mask.safetensors", "config.yaml", "result.json")

_CARD = """\
---
library_name: pytorch
tags: [pruning, sparsity, lottery-ticket, pai-bench]
---

# {id}

{model}{pruned}, trained on {dataset}.

| | |
| --- | --- |
| test accuracy after the last epoch | {top1:.2f} % |
| weights kept | {num_kept:,} of {num_prunable:,} |
| sparsity | {sparsity:.6g} |
| compression | {compression:.4g}x |
| epochs of training | {epochs} |
| seed | {seed} |

## Files

| file | |
| --- | --- |
| `model.safetensors` | the trained weights and buffers by name; pruned weights are zero |
| `mask.safetensors` | for each prunable weight a tensor of the same shape: true = kept |
| `config.yaml` | every setting of the run; of paths the last names |
| `result.json` | every number of the run |

## Use

With pai_bench, the run can be repeated from its config:

    pai-bench -cp FOLDER -cn config

The weights fit the network of the config:

```python
from safetensors.torch import load_file

weights = load_file("model.safetensors")
mask = load_file("mask.safetensors")
```

## Limits

The network was trained for research on pruning. Zeros save no time by themselves. This card was written by a program:
add a licence, and say what the network is meant for.
"""


def card(run: RunConfig, row: dict[str, Any]) -> str:
    """The model card of a run: a README with what the network is, how good it is, and how to use it."""
    by = run.pruner.label or row["pruner"]
    return _CARD.format(
        pruned=f" with {100 * row['sparsity']:.4g} % of its weights pruned by {by}" if run.prunes else "",
        id=row["id"],
        model=row["model"],
        dataset=row["dataset"],
        top1=100 * row["test_top1"],
        **{key: row[key] for key in ("sparsity", "compression", "num_kept", "num_prunable", "epochs", "seed")},
    )


def push(directory: Path, repository: str, private: bool, trusted: bool = False) -> str:
    """Uploads weights, mask, config, row and a model card of a run, as one commit; and returns where they are.

    The repository is made if it is missing. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        repository: USER/NAME.
        private: whether a new repository can be seen by its owner alone.

    Raises:
        ConfigError: huggingface_hub is not installed, or there can be no such repository.
        DataError: the directory holds no finished run, or a run that did not keep its weights.
        UserError: the hub cannot be reached, or refuses.
    """
    check_installed("--hub needs", "huggingface_hub", "hub")
    row = status.finished(directory)
    if row is None:
        raise DataError(f"{directory}: there is no whole result.json: it is not the directory of a finished run")
    if not (directory / "model.safetensors").is_file():
        raise DataError(f"{directory}: there is no model.safetensors, so {weights_again(directory)}")
    text = card(read(directory / "config.yaml", trusted), row)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    hub = HfApi()
    contents: dict[str, str | bytes] = {name: str(directory / name) for name in FILES}
    contents |= {"config.yaml": shareable(directory / "config.yaml").encode(), "README.md": text.encode()}
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
        hub.create_commit(repository, added, commit_message=f"{row['id']}, from pai_bench")
    except HFValidationError as error:
        raise ConfigError(f"--hub {repository}: there can be no such repository; give USER/NAME") from error
    except Exception as error:  # whatever the client, HTTP and the network raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--hub {repository}: it cannot be uploaded ({reason.rstrip('.')}); `hf auth login` gives access, and the "
            "repository must be yours"
        ) from error
    return str(url)
