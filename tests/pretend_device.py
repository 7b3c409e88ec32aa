"""A pretended accelerator: what goes wrong between two devices goes wrong without one, too.

    with pretended_device() as transfers:
        model.to(DEVICE)
        ...
    transfers    # a Counter: {("upload", "rollout.py:712"): 12, ("wait", "rollout.py:520"): 12}

A tensor of the device holds a CPU tensor. It computes with it, says that it lies on DEVICE, and
refuses to meet a tensor of the CPU, as CUDA does: "expected all tensors to be on the same device".
As on CUDA, numbers (tensors without dimensions) and indices may come from the CPU.

Transfers are counted by kind, and by the line of this project that asked for them:
    upload    a copy from the CPU to the device
    wait      the CPU needs a value, or a size, and waits until the device has computed it

Not covered: kernels (attention takes the plain one), memory, streams, speed. Code that asks for
`is_cuda`, or for "cuda" by name, goes the CPU's way. inference_mode is no_grad, for it knows no
subclasses of tensors. Collectives send what a tensor holds. There is no FSDP.
"""
import contextlib
import os
import sys
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Not "cuda": for that a CPU build of PyTorch has no autograd.
DEVICE = torch.device("meta")

aten = torch.ops.aten
COPYING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
WAITING = {
    aten._local_scalar_dense.default,  # .item(), float(x), "if x:"
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
# These kernels read even a number, the count of steps, on the device.
FUSED = {aten._fused_adam_.default, aten._fused_adamw_.default}

TESTS = os.path.dirname(os.path.abspath(__file__))
PROJECT = {TESTS, os.path.dirname(TESTS)}


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` is its data."""

    @staticmethod
    def __new__(cls, held):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} outside of pretended_device()")

    def __repr__(self):
        return f"OnDevice({self.held})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError("a tensor of the device cannot become an array: .cpu() is missing")

    def full_tensor(self):
        """As of a sharded tensor whose only shard this is."""
        return self

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held


def is_of_cpu(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)


def tensors_in(x):
    """The tensors in a value, and in its lists and tuples."""
    if isinstance(x, torch.Tensor):
        return [x]
    tensors = []
    if isinstance(x, (list, tuple)):
        for part in x:
            tensors += tensors_in(part)
    return tensors


def replace_tensors(x, replace):
    """A value, its lists and tuples with replace(tensor) for every tensor."""
    if isinstance(x, torch.Tensor):
        return replace(x)
    if isinstance(x, (list, tuple)):
        return type(x)(replace_tensors(part, replace) for part in x)
    return x


def asking_line():
    """The innermost line of this project that is running, as "file.py:line"."""
    frame = sys._getframe()
    while frame:
        file = frame.f_code.co_filename
        if os.path.dirname(file) in PROJECT and file != __file__:
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


class Operations(TorchDispatchMode):
    """Gets every operation below autograd: checks its devices, counts its transfers, runs it."""

    def __init__(self, forgotten):
        super().__init__()
        self.forgotten = forgotten
        self.transfers = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in(args) + tensors_in(list(kwargs.values()))
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        # What a library makes on "meta", unseen, holds nothing.
        assert all(x.device != DEVICE for x in tensors if is_of_cpu(x)), f"{operation}: no data"

        # Where the result will lie.
        is_result_ours = bool(ours)
        if kwargs.get("device") is not None:
            is_result_ours = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = "cpu"

        # What is copied between the devices, and what may not meet.
        if operation is aten._to_copy.default:
            source = args[0]
            is_upload = is_result_ours and is_of_cpu(source)
            if is_upload and asking_line() == self.forgotten:
                is_result_ours = False
            self.count_copy(is_of_cpu(source), not is_result_ours)
        elif operation is aten.copy_.default:
            target, source = args[:2]
            is_result_ours = not is_of_cpu(target)
            self.count_copy(is_of_cpu(source), is_of_cpu(target))
        elif ours:
            self.check_devices(operation, args, tensors)

        # The CPU computes it.
        def held(x):
            return x.held if isinstance(x, OnDevice) else x

        args = replace_tensors(args, held)
        for name, value in kwargs.items():
            kwargs[name] = replace_tensors(value, held)
        result = operation(*args, **kwargs)
        if not is_result_ours:
            return result

        # An operation in place returns the very tensor that it was given.
        given = {id(x.held): x for x in ours}

        def put(x):
            return given[id(x)] if id(x) in given else OnDevice(x)

        return replace_tensors(result, put)

    def count(self, kind):
        self.transfers[kind, asking_line()] += 1

    def count_copy(self, is_from_cpu, is_to_cpu):
        if is_from_cpu and not is_to_cpu:
            self.count("upload")
        if is_to_cpu and not is_from_cpu:
            self.count("wait")

    def check_devices(self, operation, args, tensors):
        """RuntimeError where a tensor of the CPU meets one of the device."""
        strangers = [x for x in tensors if is_of_cpu(x)]
        if operation not in FUSED:
            strangers = [x for x in strangers if x.ndim > 0]

        # An index of the CPU is copied. Of a mask the number of hits has to be known.
        if operation in INDEXING:
            for index in args[1]:
                if is_of_cpu(index):
                    self.count("upload")
                    strangers = [x for x in strangers if x is not index]
                elif index is not None and index.dtype == torch.bool:
                    self.count("wait")

        if strangers:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device, but "
                               f"tensors of shapes {shapes} are on the CPU")
        if operation in WAITING:
            self.count("wait")


class Lists(TorchFunctionMode):
    """Makes tensors of lists. PyTorch would make them on "meta", without data."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)

        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensor, index, *value = args
            indices = index if isinstance(index, tuple) else (index,)
            indices = [torch.tensor(i) if isinstance(i, list) else i for i in indices]
            return function(tensor, tuple(indices), *value)
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretended_device(forgotten=None):
    """Yields the Counter of transfers. forgotten: a line, "file.py:712", whose copies to the
    device do not take place, as if its `.to(device)` were missing."""
    operations = Operations(forgotten)
    no_grad = torch.no_grad
    with (
        mock.patch.object(torch.inference_mode, "__enter__", no_grad.__enter__),
        mock.patch.object(torch.inference_mode, "__exit__", no_grad.__exit__),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices",
                   lambda: ["cpu", DEVICE.type]),
        # `module.to` changes its parameters in place, as on CUDA: tied ones stay tied.
        mock.patch("torch.__future__._swap_module_params_on_conversion", True),
        Lists(),
        operations,
    ):
        yield operations.transfers
