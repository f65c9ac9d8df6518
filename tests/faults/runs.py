"""The runs that are disturbed: every command that writes something large, on tiny hosts, in a folder of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "commands"), str(TESTS / "cli"), str(TESTS.parent)]

from warm import ended, finished, warm  # noqa: E402

STEPS = 20
_ON_TINY_HOSTS = ["--max-flops", "1000", "--device", "cpu", "--offline", "--quiet"]
_TRAINED = ["--batch-size", "4"]
_TARGET = ["../place/adapter.safetensors", "--target", "../place/target"]
# Leaving these beside an unfinished output is documented (docs/format.md).
UNFINISHED = ".uhl-run"


@dataclass(frozen=True)
class Run:
    """One command.

    :param output: What it makes, in the folder that it runs in.
    :param resumable: Whether it takes `--resume`; otherwise it is repeated.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    resumable: bool = True

    def call(self, *, again: bool, save_every: int) -> list[str]:
        """The command line, of the first start or of another."""
        given = [*self.arguments, "--output", self.output, *_ON_TINY_HOSTS]
        if self.resumable:
            given += ["--save-every", str(save_every)]
        return [*given, "--resume"] if again and self.resumable else given


PRETRAIN = Run(
    "pretrain",
    (
        *("pretrain", "--host", "../place/host", "--task", "sst2", "--data", "../place/data", "--teacher", "lora"),
        *("--num-anchors", "64", "--max-steps", str(STEPS), *_TRAINED),
    ),
    "adapter.safetensors",
)
_TUNE = ("tune", *_TARGET, "--steps", str(STEPS), *_TRAINED)
RUNS = (
    PRETRAIN,
    Run("tune delta-theta", (*_TUNE, "--data", "../place/data"), "task.safetensors"),
    Run("tune lora without labels", (*_TUNE, "--parameters", "lora"), "lora"),
    Run("port", ("port", *_TARGET, "--data", "../place/data"), "ported", resumable=False),
    Run("export", ("export", *_TARGET, "--steps", str(STEPS), *_TRAINED), "exported"),
)


def prepare(root: Path) -> None:
    """Make `root/place` with the hosts, data and adapter of all runs, and import what they need."""
    os.environ |= {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "UHL_CACHE": os.devnull}
    warm()
    child = os.fork()
    if not child:  # tensors are only computed in children, so that no thread is lost in a fork
        from command_runs import write_data
        from tiny_hosts import save_tiny_host

        place = root / "place"
        save_tiny_host(place / "host", "bert")
        save_tiny_host(place / "target", "gpt2", hidden_size=48, num_hidden_layers=3, seed=1)
        write_data(place / "data")
        os._exit(0)
    assert ended(child) == 0, "the hosts could not be made"
    code, said = undisturbed(PRETRAIN, root / "first", save_every=STEPS)
    assert code == 0, said
    (root / "first" / PRETRAIN.output).rename(root / "place" / "adapter.safetensors")


def undisturbed(
    run: Run, folder: Path, *, save_every: int, again: bool = False, first: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Do the run in `folder`; its exit code and what it said.

    :param first: Called in its process, before it begins.
    """
    folder.mkdir(exist_ok=True)
    return finished(run.call(again=again, save_every=save_every), folder, first)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def of_output(files: dict[str, bytes | None], output: str) -> dict[str, bytes | None]:
    """The files of the output itself, without what is hidden."""
    return {
        name: content
        for name, content in files.items()
        if Path(name).parts[0] == output and not any(part.startswith(".") for part in Path(name).parts)
    }
