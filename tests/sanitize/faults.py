"""Faults that a sanitizer must report: `overrun` reads past an allocation, `uninitialized` reads unwritten memory.

python -m tests.sanitize.faults overrun cpu
"""

import ctypes
import sys

import torch
from torch import Tensor

import kldiv_ext

COUNT = 16


class Claim:
    """Describes a CUDA tensor as one of COUNT numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        data = (tensor.data_ptr(), False)
        self.__cuda_array_interface__ = {"data": data, "shape": (COUNT,), "typestr": "<f4", "version": 3}


def one_too_few(device: str) -> Tensor:
    """COUNT numbers, the last of them past the end of the allocation."""
    if device == "cuda":
        return torch.as_tensor(Claim(torch.zeros(COUNT - 1, device=device)), device=device)
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(ctypes.c_size_t((COUNT - 1) * ctypes.sizeof(ctypes.c_float)))
    return torch.frombuffer((ctypes.c_float * COUNT).from_address(address), dtype=torch.float32)


def unwritten(device: str) -> Tensor:
    return torch.empty(COUNT, device=device)


fault, device = sys.argv[1:]
logits = {"overrun": one_too_few, "uninitialized": unwritten}[fault](device)
kldiv_ext.distillation_loss(logits, torch.zeros(COUNT, device=device))
if device == "cuda":
    torch.cuda.synchronize()
