"""The accelerator that a run trains with."""

from __future__ import annotations

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState


def accelerator_for(device: str, mixed_precision: str) -> Accelerator:
    """An accelerator on the CPU, or on the best there is, in this precision.

    accelerate keeps the precision of a process's first one for good; it is forgotten here, because a program may
    train several times.  The process group of several processes stays.
    """
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=mixed_precision,
        # Steps without updates, and module types that a FLOP plan leaves out, leave parameters without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
