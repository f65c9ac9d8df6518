"""Hosts whose weights are quantised (weight only): an adapter is carried to them as to any other."""

from __future__ import annotations

import pytest
import torch
from tiny_adapters import tiny_universal
from tiny_hosts import SENTENCES, tiny_host, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional

from uhl_cli.host.checkpoint import wrap_host
from uhl_cli.host.hostmap import dense


class Int8(Tensor):
    """Rows as int8 codes with a scale each; it can be detached, multiplied with, and dequantised, and nothing else."""

    @staticmethod
    def __new__(cls, codes, scales):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    @classmethod
    def of(cls, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def dequantize(self):
        return self.codes.float() * self.scales

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            states, weight, *rest = args
            return functional.linear(states, weight.dequantize(), *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(function)


def quantised_linear(family):
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(family, hidden_size=32, num_hidden_layers=2, seed=0, tokenizer=tokenizer)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "pooler" not in name:
            module.weight = nn.Parameter(Int8.of(module.weight.detach()), requires_grad=False)
            count += 1
    assert count >= 12
    return wrap_host(model, tokenizer)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_carries_an_adapter_and_comes_back_as_it_was(family):
    host, full = quantised_linear(family), tiny_host(family)
    adapter = tiny_universal(full)
    objects = dict(host.model.named_parameters())
    ported, exact = adapter.port(host, max_flops=1000), adapter.port(full, max_flops=1000)
    found, wanted = ported(SENTENCES[:6]), exact(SENTENCES[:6])
    assert torch.isfinite(found).all()
    # Near to what full precision gives, and not the same.
    assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()
    assert all(dict(host.model.named_parameters())[name] is value for name, value in objects.items())


def test_dense_gives_a_weights_values():
    weight = torch.randn(4, 6)
    assert dense(nn.Parameter(weight)).equal(weight)
    assert type(dense(nn.Parameter(Int8.of(weight), requires_grad=False))) is Tensor
    assert torch.allclose(dense(Int8.of(weight)), weight, atol=0.03)


def test_torchao_int8_weight_only():
    quantization = pytest.importorskip("torchao.quantization")
    host = tiny_host("bert")
    wanted = tiny_universal(host).port(host, max_flops=1000)(SENTENCES[:6])
    quantization.quantize_(host.model, quantization.Int8WeightOnlyConfig())
    again = wrap_host(host.model, host.tokenizer)
    found = tiny_universal(tiny_host("bert")).port(again, max_flops=1000)(SENTENCES[:6])
    assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()
