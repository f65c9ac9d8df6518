"""Convert between an adapter's torch tensors and the integer codes in its file."""

from __future__ import annotations

import torch
from torch import Tensor

from uhl_cli.adapter.canonical import CanonicalAdapter
from uhl_cli.align.bank import AnchorBank
from uhl_cli.align.features import FeatureBank
from uhl_cli.codes.layout import bits_of
from uhl_cli.codes.quantise import codes_and_scales, dequantise
from uhl_cli.formats.adapter import AdapterFile, Features, Quantised
from uhl_cli.formats.transfer import StoredTransfer
from uhl_cli.schema import Manifest


def to_file(
    adapter: CanonicalAdapter,
    bank: AnchorBank,
    manifest: Manifest,
    features: FeatureBank | None = None,
    transfer: StoredTransfer | None = None,
) -> AdapterFile:
    """Quantise everything; reading it back gives `adapter.stored()`, `bank` and `features` bit for bit."""
    parameters = {}
    for name, value in adapter.named_parameters():
        codes, scales = codes_and_scales(value.cpu(), bits_of(name))
        parameters[name] = Quantised(codes.numpy(), scales.numpy())
    held = None
    if features is not None:
        entry = Quantised(features.codes.numpy(), features.scales.numpy())
        held = Features(features.anchors, entry, features.mean.numpy(), features.shift.numpy())
    coordinates = Quantised(bank.codes.numpy(), bank.scales.numpy())
    return AdapterFile(manifest, parameters, bank.anchors, coordinates, held, transfer)


def stored_parameters(content: AdapterFile) -> dict[str, Tensor]:
    """The parameters' values, float32, as `CanonicalAdapter.stored` gives them."""
    return dequantised(content.parameters)


def dequantised(parameters: dict[str, Quantised]) -> dict[str, Tensor]:
    """Values, float32, of integer codes with their scales."""
    return {
        name: dequantise(torch.from_numpy(entry.codes.copy()), torch.from_numpy(entry.scales.copy()))
        for name, entry in parameters.items()
    }


def bank_of(content: AdapterFile) -> AnchorBank:
    """The anchor bank in a file."""
    codes = torch.from_numpy(content.coordinates.codes.copy())
    scales = torch.from_numpy(content.coordinates.scales.copy())
    return AnchorBank(content.anchors, content.manifest.config.knots, codes, scales)


def features_of(content: AdapterFile) -> FeatureBank | None:
    """The feature bank in a file, or None."""
    if content.features is None:
        return None
    entry = content.features.codes
    codes, scales = torch.from_numpy(entry.codes.copy()), torch.from_numpy(entry.scales.copy())
    mean, shift = (torch.from_numpy(value.copy()) for value in (content.features.mean, content.features.shift))
    return FeatureBank(content.features.anchors, codes, scales, mean, shift)
