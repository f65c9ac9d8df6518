"""Two hosts that no choice of this project has seen, by the builtin hosts' recipe: other shapes, another vocabulary.

    python tests/benchmarks/unseen_hosts.py --text SHARED/data/text/wiki.txt.gz --teacher SHARED/hosts/minilm-l3 \
        --output FOLDER --work FOLDER

`label_free.py --at unseen-encoder=FOLDER/unseen-encoder` measures on them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import save_file

from uhl_cli.builtin.make import make_hosts
from uhl_cli.builtin.recipes import Recipe
from uhl_cli.host.packed import unpack
from uhl_cli.progress import progress_bar

VOCAB_SIZE = 9000
RECIPES = (
    Recipe("unseen-encoder", "encoder", 5, 320, 5, 1280, 1e-3, 1000, 505),
    Recipe("unseen-decoder", "decoder", 7, 224, 7, 640, 1.5e-3, 800, 707),
)


def main() -> None:
    """Train what is missing; write plain checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit-texts", type=int, default=40_000)
    arguments = parser.parse_args()
    with progress_bar(quiet=False) as reporter:
        make_hosts(
            RECIPES,
            arguments.text,
            arguments.teacher,
            arguments.work / "packed",
            arguments.work,
            limit_texts=arguments.limit_texts,
            vocab_size=VOCAB_SIZE,
            command="python tests/benchmarks/unseen_hosts.py --text TEXT --teacher HOST --output FOLDER --work FOLDER",
            reporter=reporter,
        )
    for recipe in RECIPES:
        packed, plain = arguments.work / "packed" / recipe.name, arguments.output / recipe.name
        shutil.copytree(packed, plain, dirs_exist_ok=True)
        save_file(unpack(packed / "model.safetensors"), plain / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
