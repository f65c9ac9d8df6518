"""uhl: train one small adapter, port it to any other transformer checkpoint.

`from uhl_cli import UniversalAdapter` is the Python entry point; the command
line is `uhl`.  Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PortedModel", "UniversalAdapter", "__version__", "load_ported"]

if TYPE_CHECKING:
    from uhl_cli.api import PortedModel, UniversalAdapter, load_ported


def __getattr__(name: str) -> Any:  # noqa: ANN401 - module attribute protocol
    if name in {"PortedModel", "UniversalAdapter", "load_ported"}:
        from uhl_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'uhl_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
