"""What is kept for backward? Counts the bytes autograd saves."""

from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(run: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for backward while ``run()`` runs.

    Args:
        run: computes a forward; its result is kept alive while the bytes are counted.
        exclude: tensors that do not count, such as ``module.parameters()``.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    saved: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            saved[pointer] = t  # held: a freed storage's address could come back as another's
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    del result
    return total
