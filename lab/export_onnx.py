"""Write the denoiser of a checkpoint as an ONNX file, which the page in `playground/` runs in a browser."""

import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edm.precond import PreconditionedDenoiser, iDDPMPreconditioning
from edm.schedule import RANGES
from lab.checkpoint import write_atomically
from lab.cli import Parser, UserError, run_script
from lab.config import Config
from lab.generate import NO_GUIDANCE, class_labels, load_denoiser
from lab.pictures import check_writable

if TYPE_CHECKING:  # optional packages
    import onnx

TOLERANCE = 1e-3  # the largest allowed difference of D from PyTorch's, in images of range [-1, 1]
OPSET = 18  # of ONNX's operators: what PyTorch 2.6 and later write, and onnxruntime-web reads
LARGE = 1024  # numbers in a tensor of weights; smaller ones (biases, norms, frequencies) stay in float32


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a .pt or .safetensors file, or one of the authors'")
    add("--config_path", type=Path, help="the YAML config (default: the one that the checkpoint carries)")
    add("--output", type=Path, required=True, help="the .onnx file to write")
    args = parser.parse_args()
    check_packages()
    if args.output.suffix != ".onnx":
        raise UserError(f"--output: the name {args.output.name} does not end in .onnx")
    check_writable(args.output)
    config, denoiser, _ = load_denoiser(args.checkpoint, args.config_path, NO_GUIDANCE, torch.device("cpu"))
    data, precision, difference = export(denoiser, config)
    write_atomically(args.output, lambda file: file.write(data))
    print(
        f"{args.output}: {len(data) / 1e6:.2f} MB, weights in {precision}; D differs from PyTorch's by at most {difference:.1e}"
    )


def check_packages() -> None:
    """Raise a `UserError` that names the first missing package."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise UserError(f"{name} is not installed: pip install -r requirements-dev.txt") from None


def export(denoiser: PreconditionedDenoiser, config: Config) -> tuple[bytes, str, float]:
    """Return the ONNX file of D, without guidance, with the large weights in half precision if D hardly changes by it.

    Its inputs are x (B, C, H, W), sigma (B,) and, for a network with classes, labels (B, K), one-hot or all zeros for no
    class; its output D is (B, C, H, W). All are float32, and B is free. Its metadata is that of `metadata`.

    Args:
        denoiser: on the CPU, in evaluation mode.
        config: that of the denoiser.

    Returns:
        The file; the precision of its large weights; the largest difference of D from PyTorch's.

    Raises:
        UserError: the network knows only some noise levels, PyTorch cannot export it, or the file disagrees with PyTorch.
    """
    if isinstance(denoiser.preconditioning, iDDPMPreconditioning):
        formulation = config.preconditioning.formulation
        raise UserError(f"a network of the formulation {formulation} knows only some noise levels, but the page uses all")
    model = to_onnx(denoiser, config)
    full = model.SerializeToString()
    halve_weights(model)
    for data, precision in ((model.SerializeToString(), "half precision"), (full, "float32")):
        difference = largest_difference(data, denoiser, config)
        if difference <= TOLERANCE:  # nan is not
            return data, precision, difference
    raise UserError(f"nothing was written: in ONNX, D differs from PyTorch's by {difference:.1e}, more than {TOLERANCE:g}")


def noise_range(denoiser: PreconditionedDenoiser) -> tuple[float, float]:
    """Return the lowest and the highest noise level that the network is used at: EDM's own if it knows all."""
    known, (low, high) = denoiser.preconditioning, RANGES["edm"]
    return known.sigma_min or low, known.sigma_max if math.isfinite(known.sigma_max) else high


def metadata(denoiser: PreconditionedDenoiser, config: Config) -> dict[str, object]:
    """Return what the page has to know of the network."""
    low, high = noise_range(denoiser)
    sizes = {"resolution": config.data.resolution, "channels": config.data.channels, "classes": config.network.label_dim}
    return {"name": config.name, **sizes, "sigma_min": low, "sigma_max": high}


def example(config: Config, sigma: float, batch_size: int) -> dict[str, torch.Tensor]:
    """Return inputs for D: noise of the size of noisy images, and the classes in turn, the last image's being none."""
    shape = (batch_size, config.data.channels, config.data.resolution, config.data.resolution)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(batch_size)) * math.hypot(sigma, 0.5)
    inputs = {"x": x, "sigma": torch.full((batch_size,), sigma)}
    labels = class_labels(range(batch_size), config.network.label_dim)
    if labels is not None:
        labels[-1] = 0
        inputs["labels"] = labels.float()
    return inputs


def to_onnx(denoiser: PreconditionedDenoiser, config: Config) -> "onnx.ModelProto":
    """Return D as an ONNX model in float32, with its metadata.

    Raises:
        UserError: PyTorch cannot export it.
    """
    inputs = example(config, sigma=1.0, batch_size=5)  # a size that no other axis has
    batch = torch.export.Dim("batch", min=1, max=4096)
    logging.disable(logging.ERROR)  # the exporter logs its internals
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                denoiser,
                tuple(inputs.values()),
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["D"],
                dynamic_shapes={name: {0: batch} for name in inputs},
            )
    except torch.onnx.OnnxExporterError:  # the text of which fills a screen
        raise UserError(f"PyTorch {torch.__version__} cannot export this network; a newer version may") from None
    finally:
        logging.disable(logging.NOTSET)
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for node in model.graph.node:  # where in the Python code it comes from: a fifth of the file
        del node.metadata_props[:]
        node.doc_string = ""
    for key, value in metadata(denoiser, config).items():
        model.metadata_props.add(key=key, value=str(value))
    return model


def halve_weights(model: "onnx.ModelProto") -> None:
    """Store the large weights of a model in half precision. It computes in float32 as before."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= LARGE:
            name, weights = tensor.name, numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(weights.astype("float16"), f"{name}.half"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def largest_difference(data: bytes, denoiser: PreconditionedDenoiser, config: Config) -> float:
    """Return the largest difference of D in an ONNX file from PyTorch's, over all noise levels and two batch sizes.

    Where c_out, which amplifies the rounding errors of F, is above 1, as for VP and VE, the difference is divided by it.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    low, high = noise_range(denoiser)
    differences = []
    for sigma in torch.logspace(math.log10(low), math.log10(high), 9):
        amplification = denoiser.preconditioning.c_out(sigma).abs().clamp(min=1)
        for batch_size in (1, 7):
            inputs = example(config, sigma.item(), batch_size)
            with torch.no_grad():
                expected = denoiser(**inputs)
            D = session.run(["D"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
            differences.append((torch.from_numpy(D) - expected).abs().max() / amplification)
    return torch.stack(differences).max().item()


if __name__ == "__main__":
    run_script(main)
