"""Host memory that a GPU copies from and to at full speed, while it computes.

torch's own page-locked memory comes in powers of two: a layer of 441 MB would take 512. So plain memory is registered with CUDA, to the
page. Where that is refused, as WSL does beyond a small share of RAM, the memory stays pageable: slower, and right.
"""

from __future__ import annotations

import contextlib

import torch

from qlora.engine.arena import aligned_block


class HostMemory:
    """Blocks of host memory for one device.

    Attributes:
        num_pageable_bytes: of the blocks so far, what could not be page-locked; 0 where the device is a CPU, which needs no locking.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._locks = self._device.type == "cuda"
        self._registered: list[torch.Tensor] = []
        self.num_pageable_bytes = 0

    def block(self, size_bytes: int) -> torch.Tensor:
        """uint8, beginning at a page.

        Raises:
            RuntimeError: RAM ran out; see `qlora.training.recovery.is_out_of_memory`.
        """
        block = aligned_block(size_bytes)
        if self._locks and not self._register(block):
            self.num_pageable_bytes += size_bytes
        return block

    def close(self) -> None:
        """Give the page locks back; copies from these blocks must have ended."""
        for block in self._registered:
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
        self._registered.clear()

    def _register(self, block: torch.Tensor) -> bool:
        if self.num_pageable_bytes:  # refused once: each further try would cost time and be refused as well
            return False
        refused = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), 0)
        if int(refused) == 0:
            self._registered.append(block)
            return True
        # CUDA remembers the refusal as its latest error, and the next kernel would be blamed for it: one that does nothing takes it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)
        return False
