"""Bytes of the tensors that are alive while something runs, op by op; what plans of memory are measured against."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"


class TensorBytes(TorchDispatchMode):
    """Counts each storage once, from the op that makes it until the last tensor on it is gone.

    Storages are of a kind: what stood before is of the kind that it is told to be, what an op makes of the one that
    holds at the time, see `kind`. What a kernel takes for itself while it runs is not seen.

    Attributes:
        bytes: alive, by kind.
        peak: most that were alive at once.
        at_peak: those by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.kind = OTHER
        self.known: dict[int, tuple[Any, str, int]] = {}  # by identity: storages have no other

    def count(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Tensors that stand already, as weights do."""
        for tensor in tensors:
            self._see(tensor, kind)

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What is made inside is of that kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def follow(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """What the forward passes of modules make is of the kind that they are named by."""
        for kind, module in modules:
            inside: list[str] = []
            module.register_forward_pre_hook(partial(self._enter, inside, kind))
            module.register_forward_hook(partial(self._leave, inside))

    def _enter(self, inside: list[str], kind: str, *unused: Any) -> None:
        inside.append(self.kind)
        self.kind = kind

    def _leave(self, inside: list[str], *unused: Any) -> None:
        self.kind = inside.pop()

    def restart(self) -> None:
        """The peak is that of what comes."""
        self.peak, self.at_peak = self.total, Counter(self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value, self.kind)
        if self.total > self.peak:
            self.restart()
        return result

    def _see(self, tensor: Tensor, kind: str) -> None:
        for storage in storages(tensor):
            key = id(storage)
            if key not in self.known:
                self.known[key] = weakref.ref(storage, partial(self._forget, key)), kind, 0
            self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        reference, kind, before = self.known[key]
        self.known[key] = reference, kind, size
        self.bytes[kind] += size - before
        self.total += size - before

    def _forget(self, key: int, reference: Any) -> None:
        self._resize(key, 0)
        del self.known[key]

    def __enter__(self) -> TensorBytes:
        plain = self.plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP gives back what it gathered in this way
            result = plain(storage, size)
            if id(storage) in self.known:
                self._resize(id(storage), size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        torch.UntypedStorage.resize_ = self.plain  # type: ignore[method-assign]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Of a tensor on a device; a DTensor's are those of its local part."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return [] if local.is_meta else [local.untyped_storage()]
