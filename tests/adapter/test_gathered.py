"""Products with chosen rows equal the plain ones, with and without the fast operator, in every precision."""

import pytest
import torch

from uhl_cli.adapter import sparse
from uhl_cli.adapter.sparse import Bags, row_responses, row_sums, spread


def drawn(dtype, tokens=37, atoms=11, width=24):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator).to(dtype)
    table = torch.randn(atoms, width, generator=generator).to(dtype)
    indices = torch.rand(tokens, atoms, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    return states, table, indices, weights


def bags(indices):
    return Bags.of(indices.shape[0], indices.shape[1], indices.device)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.2}


@pytest.mark.parametrize("operator", ["fast", "plain"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_responses_are_scalar_products(dtype, operator, monkeypatch):
    states, table, indices, _ = drawn(dtype)
    if operator == "plain":
        monkeypatch.setattr(sparse, "_RESPONSES", None)
    else:
        assert sparse._RESPONSES is not None  # else this test is of the plain path twice
    with torch.inference_mode():
        found = row_responses(states, table, indices, bags(indices))
    expected = (states.double() @ table.double().T).gather(1, indices)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert not torch.allclose(found.double(), expected.flip(1), atol=1.0)


def test_responses_have_gradients():
    states, table, indices, weights = drawn(torch.float32)
    states.requires_grad_(True)
    (row_responses(states, table, indices, bags(indices)) * weights).sum().backward()
    torch.testing.assert_close(states.grad, spread(weights, indices, len(table)) @ table)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_sums_are_dense_products(dtype):
    _, table, indices, weights = drawn(dtype)
    found = row_sums(table, indices, weights, bags(indices))
    expected = spread(weights.to(dtype).double(), indices, len(table)) @ table.double()
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert expected.abs().max() > 1


def test_no_tokens_give_no_responses():
    states, table, indices, weights = drawn(torch.float32)
    with torch.inference_mode():
        assert row_responses(states[:0], table, indices[:0], bags(indices[:0])).shape == (0, 2)
        assert row_sums(table, indices[:0], weights[:0], bags(indices[:0])).shape == (0, table.shape[1])
