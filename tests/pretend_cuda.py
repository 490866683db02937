"""A CUDA device that is not there: tensors that say "cuda", hold their values on the CPU, and refuse what CUDA refuses.

PyTorch's fake tensors know devices and no values, so a walk that asks for one number ends. These know both: a function that leaves
a tensor on the CPU fails as on a GPU, and what it returns can be compared with what it returns on the CPU. They are placed as fake
tensors are; `test_devices.py` holds the rules against those of `FakeTensorMode`.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch._dynamo  # which modes of dispatch load when first used, and which looks at what is patched below
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}  # from device to device
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}
PARTS = "CompositeImplicitAutograd"  # operations that consist of others; in `inference_mode` they arrive whole


class Pretended(torch.Tensor):
    """Say that `values`, a tensor of the CPU, lies on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is read back is a plain tensor

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        with torch.inference_mode(False):  # or a view of what was made outside of that mode is refused
            form = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
            self = torch.Tensor._make_subclass(cls, form, requires_grad, device_for_backend_keys=CUDA)
        self.values_there = values
        return self

    @property
    def device(self):
        """Name the device that is not there."""
        return CUDA

    @property
    def is_cuda(self):
        """Say yes, as there."""
        return True

    @property
    def is_meta(self):
        """Say no: there are values."""
        return False

    def __repr__(self):
        """Show the values."""
        return f"Pretended({self.values_there})"

    def tolist(self):
        """Bring the values to the host."""
        return self.values_there.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute on the values."""
        return compute(func, args, kwargs or {}, None)


class PretendedGenerator(torch.Generator):
    """Say that a generator lies where it was asked to; its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.place = CUDA if torch.device(device).type == "cuda" else CPU
        return self

    @property
    def device(self):
        """Name the device."""
        return self.place


def place_of(func, leaves, asked):
    """Tell where an operation runs, or refuse it as CUDA does."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if func in MOVES:
        return asked or tensors[0].device
    if func in INDEXES:
        if tensors[0].device == CPU and any(isinstance(x, Pretended) for x in tensors):
            raise RuntimeError(f"{func}: indices should be on the CPU, as the values are; they are on {CUDA}")
        return tensors[0].device
    if asked is None and any(isinstance(x, Pretended) for x in tensors):
        stay = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.ndim]
        if stay:  # a tensor without dimensions may come from the CPU
            raise RuntimeError(f"{func}: expected all tensors on {CUDA}; on the CPU there are some of shape {stay}")
        return CUDA
    return asked or CPU


def compute(func, args, kwargs, source):
    """Do on the CPU what an operation does on the device, and say that the result lies there; `source` is a generator's device."""
    leaves = tree_leaves((args, kwargs))
    asked = kwargs.get("device")
    if asked is not None:  # "meta" is what the form of a pretended tensor says to code in C++
        asked = CPU if torch.device(asked).type == "cpu" else CUDA
    place = place_of(func, leaves, asked)
    if source is not None and source.type != place.type:
        raise RuntimeError(f"{func}: expected a generator of {place}; it is one of {source}")
    if place.type == "cuda" and asked is not None:
        kwargs = {**kwargs, "device": CPU}
    owners = {id(x.values_there): x for x in leaves if isinstance(x, Pretended)}

    def dressed(x):
        if not isinstance(x, torch.Tensor) or id(x) in owners:  # the latter was written in place
            return owners.get(id(x), x)
        return Pretended(x) if place.type == "cuda" else x

    bare = lambda x: x.values_there if isinstance(x, Pretended) else x
    return tree_map(dressed, func(*tree_map(bare, args), **tree_map(bare, kwargs)))


class Operations(TorchDispatchMode):
    """Catch every operation, those that make tensors included."""

    source = None  # device of the generator of the call that is under way

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute on the values."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), PARTS):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return compute(func, args, kwargs or {}, self.source)


class Calls(TorchFunctionMode):
    """Catch what operations no longer show: from which generator numbers come, and what begins or ends in Python."""

    def __init__(self, operations):
        self.operations = operations

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function."""
        kwargs = dict(kwargs or {})
        if func in FROM_PYTHON and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            place = kwargs.pop("device")
            return func(*args, **kwargs).to(place)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretended):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(CUDA)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Pretended):  # lists are read where PyTorch cannot be followed
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(one) if isinstance(one, list) else one for one in index)
        if func is torch.Tensor.numpy:
            if isinstance(args[0], Pretended):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            with _disable_current_modes():
                return func(*args, **kwargs)
        source = getattr(kwargs.get("generator"), "device", None)
        with patch.object(self.operations, "source", source) if source else nullcontext():
            return func(*args, **kwargs)


@contextmanager
def pretended_cuda():
    """Pretend, inside, that there is a CUDA device."""
    torch._C._ensureCUDADeviceGuardSet()  # as fake tensors do, where there is no driver
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    operations = Operations()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        nothing = lambda *args, **kwargs: None
        for name in ("_lazy_init", "manual_seed", "set_rng_state"):
            stack.enter_context(patch(f"torch.cuda.{name}", nothing))
        stack.enter_context(patch("torch.cuda.get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8)))
        stack.enter_context(patch("torch.cuda.device", lambda device: nullcontext()))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True))
        stack.enter_context(patch("torch.Generator", PretendedGenerator))
        stack.enter_context(operations)
        stack.enter_context(Calls(operations))
        yield CUDA
