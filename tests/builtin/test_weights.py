"""Packed weights come back within half a step of each row's scale; a damaged file is refused."""

from __future__ import annotations

import pytest
import torch

from uhl_cli.errors import HostError
from uhl_cli.host.packed import pack, unpack


def test_round_trip_is_within_half_a_step_of_every_row(tmp_path):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 30, generator=generator) * torch.logspace(-3, 2, 40)[:, None]
    state = {"matrix": matrix, "vector": torch.randn(7, generator=generator), "zeros": torch.zeros(3, 4)}
    (tmp_path / "w").write_bytes(pack(state))
    back = unpack(tmp_path / "w")
    assert back.keys() == state.keys()
    step = matrix.abs().amax(1, keepdim=True) / 127
    error = (back["matrix"] - matrix).abs()
    assert bool((error <= step * 0.5001).all())
    assert float(error.max()) > 0, "nothing was rounded: the file is not packed"
    torch.testing.assert_close(back["vector"], state["vector"], atol=2e-3, rtol=1e-3)
    assert torch.equal(back["zeros"], state["zeros"])
    assert all(value.dtype == torch.float32 for value in back.values())
    assert len(pack(state)) < 2 * matrix.numel() + 2000
    assert pack(state) == pack(dict(reversed(state.items())))


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_weights_are_refused(content, tmp_path):
    path = tmp_path / "w"
    path.write_bytes(pack({"a": torch.ones(50, 50)})[:-10] if content is None else content)
    with pytest.raises(HostError, match="cannot be read"):
        unpack(path)
