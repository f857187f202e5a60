"""Takes training state out of the device memory while others need that: a rollout engine, or the backward.

For an engine that shares the device everything leaves that only an update needs: the optimizer's moments and
fp32 main parameters go to host memory, gradients are dropped, since every update begins with zeros. During
the backward the optimizer's part of it may be away. The weights stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class TrainingStateOffload:
    """Moves the training state of ``model_chunks`` and ``optimizer`` to host memory and back.

    Memory is released under the tensors, whose storages shrink to nothing and grow again: every view that
    Megatron holds stays valid, and no bit changes. Host copies, pinned where there is a GPU, are allocated
    at the first time and then reused.
    """

    def __init__(self, model_chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._model_chunks = model_chunks
        self._optimizer = optimizer
        self._spare_copies: dict[int, list[Tensor]] = {}  # by their size
        self._moved: list[tuple[torch.UntypedStorage, Tensor]] = []  # from where, to where
        self.is_out = False

    def move_out(self) -> None:
        """Release the device memory. No effect where it was released already."""
        if self.is_out:
            return
        self.is_out = True
        self._release_optimizer_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Megatron calls what torch has deprecated
            for chunk in self._model_chunks:
                chunk.offload_grad_buffers()  # then returns all that is free to the device, for others to use

    def move_in(self) -> None:
        """Bring the state back, with gradients of zero. No effect where it is there."""
        if not self.is_out:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for chunk in self._model_chunks:
                chunk.restore_grad_buffers()
        self._restore_optimizer_state()
        self.is_out = False

    @contextmanager
    def optimizer_state_out(self) -> Iterator[None]:
        """The optimizer's state is in host memory inside the block."""
        self._release_optimizer_state()
        try:
            yield
        finally:
            self._restore_optimizer_state()

    def _release_optimizer_state(self) -> None:
        for storage in self._storages():
            source = _bytes_of(storage)
            spare = self._spare_copies.get(len(source))
            copy = spare.pop() if spare else _host_memory_for(source)
            self._moved.append((storage, copy.copy_(source)))
            storage.resize_(0)

    def _restore_optimizer_state(self) -> None:
        for storage, copy in self._moved:
            storage.resize_(len(copy))
            _bytes_of(storage).copy_(copy)
            self._spare_copies.setdefault(len(copy), []).append(copy)
        self._moved.clear()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Each piece of memory that the optimizer has beside the model's: fp32 parameters are the weights."""
        seen = {p.untyped_storage().data_ptr() for chunk in self._model_chunks for p in chunk.parameters()}
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            tensors = [p for group in part.optimizer.param_groups for p in group["params"]]
            tensors += [
                value
                for state in part.optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ]
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    yield storage


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """[bytes] uint8, a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory_for(source: Tensor) -> Tensor:
    return torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=not source.is_cpu)
