"""The parts of a file make up its size to the byte, and every parameter is in exactly one part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_adapters import SMALL, random_adapter, tiny_file, tiny_transfer

from uhl_cli.budget.sizes import PARTS, file_sizes
from uhl_cli.codes.layout import parameter_shapes
from uhl_cli.errors import FormatError
from uhl_cli.formats.adapter import read_adapter, write_adapter
from uhl_cli.formats.container import ADAPTER, write
from uhl_cli.schema import AdapterConfig

CONFIGS = (
    SMALL,
    SMALL.model_copy(update={"kind": "tokens", "num_labels": 4, "top_k": 1, "knots": (0.5, 1.0)}),
    AdapterConfig(num_atoms=16, canonical_size=12),
)
SHIPPED = sorted((Path(__file__).parents[2] / "adapters").glob("*.safetensors"))


def written(path: Path, config: AdapterConfig = SMALL) -> Path:
    write_adapter(path, tiny_file(config))
    return path


def by_part(path: Path, config: AdapterConfig) -> dict[str, tuple[int, int]]:
    sizes = file_sizes(path, parameter_shapes(config))
    return {part.part: (part.bytes, part.parameters) for part in sizes.parts}


@pytest.mark.parametrize(("featured", "taught"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("config", CONFIGS, ids=["odd", "tokens", "even"])
def test_parts_make_up_the_file_to_the_byte(tmp_path, config, featured, taught):
    path = tmp_path / "a.safetensors"
    write_adapter(path, tiny_file(config, featured=featured, transfer=tiny_transfer(config) if taught else None))
    sizes = file_sizes(path, parameter_shapes(config))
    assert sizes.bytes == path.stat().st_size == len(path.read_bytes())
    assert sum(part.bytes for part in sizes.parts) == sizes.bytes
    absent = (() if featured else ("feature",)) + (() if taught else ("transfer",))
    assert [part.part for part in sizes.parts] == [part for part in PARTS if not part.startswith(absent)]
    # An independent reader sees the same bytes of tensors.
    tensors = load_file(path)
    header = next(part.bytes for part in sizes.parts if part.part == "header")
    assert sum(tensor.nbytes for tensor in tensors.values()) == sizes.bytes - header
    for part in sizes.parts[1:]:
        names = {
            "anchor coordinates": ["anchors.codes", "anchors.scale"],
            "feature bank": ["features.codes", "features.scale", "features.mean", "features.shift"],
        }.get(
            part.part, [tensor for name in PARTS[part.part] for tensor in (name, f"{name}.scale") if tensor in tensors]
        )
        assert part.bytes == sum(tensors[name].nbytes for name in names)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_to_the_byte(path):
    config = read_adapter(path).manifest.config
    sizes = file_sizes(path, parameter_shapes(config))
    assert sum(part.bytes for part in sizes.parts) == sizes.bytes == path.stat().st_size <= 1_000_000
    assert by_part(path, config)["delta-theta"] == (8 * config.num_atoms // 2 + 4 * 8, 8 * config.num_atoms)


def test_four_bits_a_value_and_four_bytes_a_scale(tmp_path):
    found = by_part(written(tmp_path / "a.safetensors"), SMALL)
    assert found["delta-theta"] == (8 * 7 // 2 + 4 * 8, 8 * 7)
    assert found["atoms"] == (2 * (7 * 9 + 4 * 7), 2 * 7 * 9)
    assert found["anchor texts"][1] == found["anchor coordinates"][1] == found["header"][1] == 0


@pytest.mark.parametrize("config", CONFIGS, ids=["odd", "tokens", "even"])
def test_parameters_are_those_of_the_adapter(tmp_path, config):
    sizes = file_sizes(written(tmp_path / "a.safetensors", config), parameter_shapes(config))
    assert sizes.parameters == sum(value.numel() for value in random_adapter(config).parameters())
    named = [name for names in PARTS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(parameter_shapes(config)) <= set(named)


def test_a_wider_readout_grows_the_readout_alone(tmp_path):
    wide = SMALL.model_copy(update={"readout_size": 6})
    before = by_part(written(tmp_path / "a.safetensors"), SMALL)
    after = by_part(written(tmp_path / "b.safetensors", wide), wide)
    grown = {name for name in before if after[name][1] != before[name][1]}
    assert grown == {"readout"}
    inputs = 3 * 9
    # One row of the first layer with its scale and bias, one value of the pool, one column of the last.
    assert after["readout"][0] - before["readout"][0] == inputs + 4 + 1 + 1 + 3
    unchanged = set(before) - {"readout", "header"}
    assert {name: after[name][0] for name in unchanged} == {name: before[name][0] for name in unchanged}


def test_damaged_files_are_refused(tmp_path):
    path = written(tmp_path / "a.safetensors")
    shapes = parameter_shapes(SMALL)
    data = path.read_bytes()
    for odd in (data + b"\0", data[:-1]):
        path.write_bytes(odd)
        with pytest.raises(FormatError, match="not a whole"):
            file_sizes(path, shapes)
    path.write_bytes(data)
    tensors = load_file(path)
    save_file({**tensors, "stowaway": tensors["atoms_u"]}, path)
    with pytest.raises(FormatError, match="not a uhl adapter"):
        file_sizes(path, shapes)
    with pytest.raises(FormatError, match="no file"):
        file_sizes(tmp_path / "none.safetensors", shapes)


def test_parts_that_are_not_known_are_counted(tmp_path):
    path = written(tmp_path / "a.safetensors")
    tensors = load_file(path)
    before = by_part(path, SMALL)
    write(path, ADAPTER, tiny_file().manifest, {**tensors, "transfer.codes": np.zeros(77, np.uint8)})
    after = by_part(path, SMALL)
    assert after.pop("other parts") == (77, 0)
    assert {name: after[name] for name in after if name != "header"} == {
        name: before[name] for name in before if name != "header"
    }


def test_measuring_imports_no_torch(tmp_path):
    path = written(tmp_path / "a.safetensors")
    code = (
        "import sys; from pathlib import Path; from uhl_cli.formats.adapter import read_adapter;"
        "from uhl_cli.codes.layout import parameter_shapes; from uhl_cli.budget.sizes import file_sizes;"
        f"path = Path({str(path)!r}); file_sizes(path, parameter_shapes(read_adapter(path).manifest.config));"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
