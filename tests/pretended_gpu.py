"""Pretend that there is a CUDA GPU, on a machine that has none, and count what it would do.

    with pretended_gpu((7, 5)) as gpu:  # the compute capability of a T4
        ...

Tensors on "cuda" have a shape, strides and a dtype but no data (PyTorch's FakeTensorMode), and those on the CPU are real, so
whole commands run. What comes back from the GPU is zeros. What would fail on a GPU is an error: operations between devices,
random numbers from a generator of the CPU, and what Adam's fused kernel refuses. `gpu.waits` lists what would make Python wait
for the GPU, with the line that asked for it. With `gpu.is_counting`, `gpu.launches` and `gpu.traffic` count kernels and bytes
by operation, and `gpu.peak` is the highest number of bytes in use.

Not pretended: numbers, speed, the choices of cuDNN and cuBLAS, fused attention (its plain formula runs), Triton, NCCL.

As a script it counts one training step: python tests/pretended_gpu.py [configs/edm.yaml] [section.key=value ...]
"""

import contextlib
import sys
import traceback
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DATA_DEPENDENT = ("nonzero", "masked_select", "_unique2", "unique_dim")
LIBRARIES = ("/torch/", "/lib/python", __file__)
SUPPORTED = hasattr(torch._C, "_ensureCUDADeviceGuardSet")  # which makes PyTorch believe in a GPU; the oldest release lacks it


class PretendedGPU(FakeTensorMode):
    """Computes the shapes of everything on the GPU, and runs everything on the CPU for real."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.is_counting = False
        self.launches, self.traffic = Counter(), Counter()
        self.in_use = self.peak = 0
        self.storages = set()
        self.unpacked = []  # boxes of saved tensors that the running node of the backward pass has used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if func.namespace == "prim":  # asks for the device
            return args[0].fake_device
        inputs = on_gpu((args, kwargs))
        target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if not inputs and target != "cuda":
            return func(*args, **kwargs)  # on the CPU, for real
        if name in DATA_DEPENDENT or (name.startswith("index") and has_mask(args[1])):
            raise RuntimeError(f"{func}: the shape of the result depends on data, for which Python would wait")
        if name in ("_local_scalar_dense", "equal"):
            self.wait("a number")
            return torch.zeros((), dtype=args[0].dtype).item()
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.wait("a copy to the CPU")
            return args[0].zero_()
        if name == "_to_copy" and target == "cpu":
            self.wait("a copy to the CPU")
            x = args[0]
            return torch.empty_strided(x.shape, x.stride(), dtype=kwargs.get("dtype") or x.dtype).zero_()
        if name == "_to_copy" and not inputs and not kwargs.get("non_blocking"):
            self.wait("a copy to the GPU")
        if name == "_fused_adam_":  # FakeTensorMode does not know it
            check_layouts(*args[:4])
            out = None
        else:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        if name.startswith("native_group_norm"):  # as of PyTorch 2.14 the kernels know no channels last
            out = (torch.empty_like(out[0], memory_format=torch.contiguous_format), *out[1:])
        if self.is_counting:
            self.count(func, args, inputs, on_gpu(out))
        return out

    def wait(self, what: str) -> None:
        """Record the innermost line outside PyTorch, the standard library and this file."""
        for frame, line in traceback.walk_stack(None):
            code = frame.f_code
            if not any(part in code.co_filename for part in LIBRARIES):
                self.waits.append(f"{what} in {code.co_name}, {Path(code.co_filename).name}:{line}")
                return

    def count(self, func, args: tuple, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Count a launch that reads its inputs once and writes its outputs once, and the memory of the outputs.

        Views and allocations are no launches. The traffic within convolutions is left out. Inputs in another layout than that
        of a kernel are copied first.
        """
        name = func._overloadpacket.__name__
        for storage in (tensor.untyped_storage() for tensor in outputs):
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.in_use += storage.nbytes()
                self.peak = max(self.peak, self.in_use)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        if func.is_view or name == "_unsafe_view" or "empty" in name:
            return
        self.launches[name] += 1
        features = [tensor for tensor in inputs if tensor.ndim == 4]
        if name.startswith("convolution"):
            layout, inputs, outputs = torch.channels_last, [], []
        else:
            layout = torch.contiguous_format if name.startswith("native_group_norm") else None
        for tensor in features if layout else []:
            if not tensor.is_contiguous(memory_format=layout):
                self.launches["copies to another layout"] += 1
                self.traffic["copies to another layout"] += 2 * num_bytes([tensor])
        written = [value for argument, value in zip(func._schema.arguments, args) if is_written(argument)]
        outputs = [tensor for tensor in outputs if not any(tensor is other for other in inputs)]
        self.traffic[name] += num_bytes(inputs) + num_bytes(outputs) + num_bytes(on_gpu(written))

    def free(self, address: int, size: int) -> None:
        self.storages.remove(address)
        self.in_use -= size

    def save(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Put a tensor that the backward pass needs into a box."""
        return [tensor]

    def use(self, box: list[torch.Tensor]) -> torch.Tensor:
        """Return the tensor in a box, and remember the box, which is emptied after the node that uses it."""
        self.unpacked.append(box)
        return box[0]

    def run_backward(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> Iterator[tuple[object, dict]]:
        """Run the backward pass, for which PyTorch's own engine would ask the GPU.

        Yields:
            Every node, after all nodes that use it, and the gradients that reach it, {number of the node's output: gradient}.
        """
        uses, stack, arrived = Counter(), [output.grad_fn for output in outputs], defaultdict(dict)
        ready = list(stack)
        for output, gradient in zip(outputs, gradients):
            arrived[output.grad_fn][output.output_nr] = gradient
        while stack:
            for following, _ in stack.pop().next_functions:
                if following is not None:
                    uses[following] += 1
                    stack += [following] * (uses[following] == 1)
        while ready:
            node = ready.pop()
            incoming = arrived.pop(node, {})
            yield node, incoming
            results = None
            if incoming and not is_leaf(node):
                results = node(*[incoming.get(number) for number in range(len(node._input_metadata))])
            results = results if isinstance(results, tuple) else (results,) * len(node.next_functions)
            while self.unpacked:
                self.unpacked.pop().clear()
            for (following, number), gradient in zip(node.next_functions, results):
                if following is None:
                    continue
                if gradient is not None:
                    expected, sum_so_far = following._input_metadata[number], arrived[following].get(number)
                    gradient = gradient.sum_to_size(tuple(expected.shape)).to(expected.dtype)
                    arrived[following][number] = gradient if sum_so_far is None else sum_so_far + gradient
                uses[following] -= 1
                ready += [following] * (uses[following] == 0)

    @torch.no_grad()
    def backward(self, output: torch.Tensor) -> None:
        """Do what `output.backward()` does. A gradient has the layout of its parameter."""
        for node, incoming in self.run_backward([output], [torch.ones_like(output)]):
            if is_leaf(node) and incoming:
                gradient, parameter = incoming[0].detach(), node.variable
                if strides(gradient) != strides(parameter):
                    gradient = torch.empty_like(parameter).copy_(gradient)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    @torch.no_grad()
    def grad(
        self, output: torch.Tensor, inputs: torch.Tensor | list[torch.Tensor], gradient: torch.Tensor | None = None
    ) -> tuple:
        """Do what `torch.autograd.grad(output, inputs, gradient)` does."""
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        gradient = torch.ones_like(output) if gradient is None else gradient
        arrived = {node: incoming for node, incoming in self.run_backward([output], [gradient])}
        return tuple(arrived[edge.node].get(edge.output_nr) for edge in map(get_gradient_edge, inputs))


class Generator(torch.Generator):
    """A generator of the CPU that says it is on the device that was asked for."""

    def __new__(cls, device: torch.device | str = "cpu"):
        self = super().__new__(cls, "cpu")
        self.asked = torch.device(device)
        return self

    device = property(lambda self: self.asked)


def checked(draw):
    """Return torch.randn or the like with the check that PyTorch makes on a GPU: its generator is on the same device."""

    def call(*args, generator=None, device=None, **kwargs):
        if generator is not None and generator.device.type != torch.device(device or "cpu").type:
            raise RuntimeError(f"{draw.__name__} on {device} with a generator on {generator.device}")
        return draw(*args, generator=generator, device=device, **kwargs)

    return call


def on_gpu(tree: object) -> list[torch.Tensor]:
    """Return the different tensors on the pretended GPU in a nest of tuples, lists and dicts."""
    leaves = [tree] if isinstance(tree, torch.Tensor) else tree_leaves(tree)
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, FakeTensor)}.values())


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Return how many bytes of memory hold the tensors; an expanded tensor has fewer than its shape says."""
    return sum(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) for tensor in tensors)


def strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


def is_leaf(node: object) -> bool:
    """Return whether a node of the graph stands for a parameter."""
    return hasattr(node, "variable")


def is_written(argument: object) -> bool:
    """Return whether an operation changes this argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def has_mask(indices: object) -> bool:
    """Return whether one of the indices is a mask."""
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(indices))


def check_layouts(*lists: list[torch.Tensor]) -> None:
    """Raise an error unless parameters, gradients and moments agree, as Adam's fused kernel on a GPU demands."""
    for tensors in zip(*lists):
        if len({(tensor.shape, tensor.dtype, tensor.device, tuple(strides(tensor))) for tensor in tensors}) > 1:
            raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


@contextlib.contextmanager
def pretended_gpu(capability: tuple[int, int]) -> Iterator[PretendedGPU]:
    """Pretend that there is a GPU of this compute capability. It is forgotten when the context ends, with all its tensors."""
    gpu, real = PretendedGPU(), {"save": torch.save, "load": torch.load}

    def on_either(pretended, real):
        def call(tensor, *args, **kwargs):
            if on_gpu(tensor):
                return pretended(tensor, *args, **kwargs)
            with _disable_current_modes():
                return real(tensor, *args, **kwargs)

        return call

    def save(contents, *args, **kwargs):
        contents = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, FakeTensor) else leaf, contents)
        with _disable_current_modes():
            real["save"](contents, *args, **kwargs)

    def load(*args, **kwargs):
        with _disable_current_modes():
            return real["load"](*args, **kwargs)

    replaced = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.get_device_capability": lambda device=None: capability,
        "torch.cuda.get_device_name": lambda device=None: "pretended GPU",
        "torch.cuda.get_arch_list": lambda: ["sm_{}{}".format(*capability)],
        "torch.cuda.is_bf16_supported": lambda *args: True,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.synchronize": lambda device=None: gpu.wait("synchronize"),
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak", gpu.in_use),
        "torch.cuda.max_memory_allocated": lambda device=None: gpu.peak,
        "torch.Generator": Generator,
        "torch.Tensor.pin_memory": lambda self: self,
        "torch.Tensor.backward": on_either(gpu.backward, torch.Tensor.backward),
        "torch.autograd.grad": on_either(gpu.grad, torch.autograd.grad),
        "torch.save": save,
        "torch.load": load,
    }
    replaced |= {f"torch.{draw.__name__}": checked(draw) for draw in (torch.rand, torch.randn, torch.randint, torch.randperm)}
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True)))
        stack.enter_context(
            mock.patch.object(FakeTensor, "__format__", lambda self, form: format(self.item(), form), create=True)
        )
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which deepcopy does
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(gpu)
        yield gpu


def main() -> None:
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    from benchmarks.throughput import training_step
    from lab.config import load

    path, *overrides = sys.argv[1:] or [root / "configs/edm.yaml"]
    with pretended_gpu((7, 5)) as gpu, saved_tensors_hooks(gpu.save, gpu.use):
        gpu.is_counting = True
        step = training_step(load(path, [*overrides, "preconditioning.sigma_data=0.5"]), torch.device("cuda"))
        step()
        for counted in (gpu.launches, gpu.traffic, gpu.waits):
            counted.clear()
        gpu.peak = gpu.in_use
        step()
    print("One training step in fp16, counted, not measured:")
    print(f"  {sum(gpu.launches.values()):,} launches")
    print(f"  {sum(gpu.traffic.values()) / 1e9:.1f} GB of traffic outside convolutions")
    print(f"  {gpu.peak / 2**30:.2f} GiB of memory at the peak")
    for name, number in gpu.traffic.most_common(8):
        print(f"  {number / 1e9:6.1f} GB in {gpu.launches[name]:5,} launches: {name}")


if __name__ == "__main__":
    main()
