"""What a file, SAT-LoRA and a LoRA take on published hosts, by their shapes alone: no weights are loaded.

    python tests/benchmarks/sizes.py --output tests/benchmarks/results/sizes.json

The file is counted by `uhl budget --target-config`; the baselines as `uhl compare` counts them, on the meta device.
Bytes are those of the file for one task on one target; memory is that of the tensors beside the host's weights as they
run, SAT-LoRA's (its dictionaries, before they are mixed to factors) and LoRA's in float32 as trained; FLOPs are those
of 128 tokens, unmerged, with SAT-LoRA's factors mixed, without the head's, which are two rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from uhl_cli.compare.baselines import Retrained
from uhl_cli.compare.sections import TrainingSection
from uhl_cli.cost.flops import count_flops, counted_operators
from uhl_cli.cost.passes import SEQUENCE_LENGTH
from uhl_cli.files import write_text
from uhl_cli.host.config_only import load_config_host
from uhl_cli.host.running import MetaGroups

# Sizes of published models: widths, layers, heads, feed-forward width.
SHAPES = {"BERT-base": (768, 12, 12, 3072), "BERT-large": (1024, 24, 16, 4096), "BERT-tiny": (128, 2, 2, 512)}
BASELINES = ("sat-lora", "lora")
LABELS = 2


def configuration(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """A config.json of BERT with this shape."""
    width, layers, heads, inner = shape
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, **sizes}


def of_file(adapter: Path, config: Path) -> dict[str, float]:
    """What `uhl budget` says of the file."""
    command = [sys.executable, "-m", "uhl_cli", "budget", str(adapter), "--target-config", str(config), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    target = found["target"]
    return {
        "bytes": found["file"]["bytes"],
        "memory_mb": target["memory"]["adapter_weights"] / 1e6,
        "flops_percent": target["flops"]["torch"]["percent"],
    }


def of_baseline(method: str, config: Path) -> dict[str, float]:
    """What a baseline of `uhl compare` takes at its defaults."""
    host = load_config_host(str(config))
    own = count_flops(host, None)
    model = Retrained(method, host, LABELS, TrainingSection()).to("meta")
    ids = torch.zeros(1, SEQUENCE_LENGTH, dtype=torch.int64, device="meta")
    if model.shared is not None:
        model.shared.freeze()
    with (
        torch.inference_mode(),
        MetaGroups(),
        FlopCounterMode(display=False, custom_mapping=counted_operators()) as counter,
        model.attached(),
    ):
        model.model(input_ids=ids)
    memory = sum(value.nbytes for value in model.trained_parameters()) / 1e6
    flops = 100 * (int(counter.get_total_flops()) - own) / own
    return {"bytes": model.stored_bytes(), "memory_mb": memory, "flops_percent": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=Path("adapters/sst2-minilm-l6.safetensors"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(configuration(shape)))
            rows[name] = {"uhl": of_file(arguments.adapter, config)}
            rows[name] |= {method: of_baseline(method, config) for method in BASELINES}
            print(name, json.dumps(rows[name]), flush=True)
    write_text(arguments.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
