"""Find the base model inside any model: one with a head, a wrapper, a SentenceTransformer or a PeftModel."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from uhl_cli.errors import HostMapError


def base_of(model: nn.Module) -> nn.Module:
    """The one transformers model that `model` is or holds, without its head; of an encoder-decoder, the encoder.

    A model that holds none is returned as it is.

    :raises HostMapError: It holds several, or adapters or prompts of peft that a port would not keep.
    """
    _refuse_peft(model)
    held = _outermost(model)
    if len(held) > 1:
        raise HostMapError(
            f"{type(model).__name__} holds {len(held)} models: {', '.join(held)}.", "Pass the one that reads the texts."
        )
    whole = next(iter(held.values()), model)
    base: nn.Module = getattr(whole, "base_model", whole)
    # Classes of the encoder alone (T5EncoderModel) write False, and AutoModel builds both from their checkpoints.
    both = all(isinstance(getattr(base, part, None), nn.Module) for part in ("encoder", "decoder"))
    if (both or getattr(getattr(base, "config", None), "is_encoder_decoder", False)) and hasattr(base, "get_encoder"):
        encoder: nn.Module = base.get_encoder()  # type: ignore[operator]
        takes_ids = isinstance(encoder, PreTrainedModel)
        if takes_ids:
            return encoder
    return base


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """Models of transformers' classes that are inside no other, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return found


def _refuse_peft(model: nn.Module) -> None:
    """Its layers are no plain linear modules once they are trained, and its prompts are no part of the base model.

    peft is not imported.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and _changes_output(module):
            raise HostMapError(
                f"'{name}' is a layer of peft ({type(module).__name__}), not a plain module.",
                "Call merge_and_unload() first, and pass the model that it returns.",
            )
    if getattr(model, "prompt_encoder", None):
        raise HostMapError(
            f"{type(model).__name__} puts trained prompts before every text, which a port would leave out.",
            "Pass its get_base_model() to port to the model without them.",
        )


def _changes_output(layer: nn.Module) -> bool:
    """Whether a layer of peft may give another output than what it wraps; not an untrained LoRA, whose B is zero."""
    factors = [value for name, value in layer.named_parameters() if "lora_B" in name]
    return not factors or any(bool(value.any()) for value in factors)
