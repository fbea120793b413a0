"""Files in the layout of the authors'."""

import pickle
from collections import OrderedDict

import numpy
from test_network import reference_net
from torch import nn


def reconstruct(meta):
    raise AssertionError("code of the file ran")


class Persistent(nn.Module):
    """Pickled as the authors' classes are: a call of their wrapper with one dict."""

    def __init__(self, class_name: str, state: dict):
        super().__init__()
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": class_name, "state": state}

    def __reduce__(self):
        return reconstruct, (self.meta,)


def in_authors_layout(module: nn.Module, class_name: str = "Layer", **attributes) -> nn.Module:
    """A module of ours as the authors would have pickled it; plain containers of layers stay what they are."""
    children = {name: in_authors_layout(child) for name, child in module.named_children()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules.update(children)
        return container
    state = {key: value for key, value in nn.Module().__dict__.items()}
    state |= {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": OrderedDict(children)}
    return Persistent(class_name, {**state, "_init_args": (), "_init_kwargs": {"dropout": 0.1}, **attributes})


def authors_file(path, case, protocol=4, class_name=None, **attributes):
    net = reference_net(case).float()
    attributes = {
        "img_resolution": case["img_resolution"],
        "sigma_data": numpy.float64(0.5),
        "beta_d": numpy.float32(19.9),
        "M": 1000,
        **attributes,
    }
    network = in_authors_layout(net, class_name or case["preconditioning"], **attributes)
    path.write_bytes(pickle.dumps({"ema": network, "dataset_kwargs": {"resolution": 16}}, protocol=protocol))
    return path
