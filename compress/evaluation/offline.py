"""Stand-ins for what foreign code expects and does not find: weights to download, a compiler, int8 layers that unpickle.

The file runs in the sandbox's child and is loaded by its path. Code that downloads pretrained weights only to overwrite
them must not fail for want of a network. So a download gives no weights, and loading "no weights" leaves a network as it
was initialized. `StandIns` records who asked, so that the result can say so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pth.tar", ".safetensors", ".tar"}
HUBS = {"pytorch/vision": "torchvision.models", "pytorch-image-models": "timm"}


class NoWeights(dict):  # type: ignore[type-arg]
    """The state dict of weights that were not downloaded: empty, and any entry of it is empty too."""

    def __missing__(self, key: Any) -> NoWeights:
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no network here: these pretrained weights were not downloaded, so nothing has a {name}")

    def __delitem__(self, key: Any) -> None:
        """Delete nothing: code drops the entries of a head that it replaces."""

    def pop(self, key: Any, default: Any = None) -> Any:
        """Return the default: code takes out the entries of a head that it replaces."""
        return default


class StandIns:
    """What foreign code asked for and did not get.

    Attributes:
        asked: the names of pretrained weights, in order.
        compiled: whether the code called torch.compile; its model then runs uncompiled.
        random: fingerprints of the weight tensors, as they were initialized, of networks that would have got the weights.
        loaded: fingerprints of the weight tensors that `load_state_dict` has given other numbers.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.compiled = False
        self.random: set[bytes] = set()
        self.loaded: set[bytes] = set()

    def install(self) -> None:
        """Replace what would need a network or a compiler, in torch now and in other packages once they are imported."""
        self._patch_loading()
        hub: Any = torch.hub
        plain_load = hub.load

        def load_state_dict_from_url(url: str, *_: Any, **__: Any) -> NoWeights:
            self.asked.append(str(url).rpartition("/")[2])
            return NoWeights()

        def download_url_to_file(url: str, dst: str, *_: Any, **__: Any) -> None:
            self.asked.append(str(url).rpartition("/")[2])
            write_no_weights(Path(dst))

        def load(repo_or_dir: str, model: str, *args: Any, source: str = "github", **kwargs: Any) -> Any:
            package = next((package for name, package in HUBS.items() if name in str(repo_or_dir)), None)
            if source != "github" or package is None:
                return plain_load(repo_or_dir, model, *args, source=source, **kwargs)
            for name in ("trust_repo", "force_reload", "verbose", "skip_validation"):
                kwargs.pop(name, None)
            module = importlib.import_module(package)
            return getattr(module, model)(*args, **kwargs) if package != "timm" else module.create_model(
                model, *args, **kwargs)

        hub.load, hub.download_url_to_file = load, download_url_to_file
        hub.load_state_dict_from_url = load_state_dict_from_url
        for name in ("torch.utils.model_zoo", "torchvision._internally_replaced_utils"):
            if name in sys.modules:
                for attribute in ("load_url", "load_state_dict_from_url"):
                    if hasattr(sys.modules[name], attribute):
                        setattr(sys.modules[name], attribute, load_state_dict_from_url)

        def compile(model: Any = None, *_: Any, **__: Any) -> Any:
            self.compiled = True
            if isinstance(model, nn.Module):  # torch's own wrapper holds the module there; the state dict stays the same
                object.__setattr__(model, "_orig_mod", model)
            return (lambda function: function) if model is None else model

        torch.compile = compile
        changes = {"timm.models._builder": self._patch_timm,
                   "huggingface_hub.file_download": self._patch_hugging_face,
                   "torch.ao.nn.quantized.modules.conv": mend_int8_convolutions}
        for name in [name for name in changes if name in sys.modules]:
            changes.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, AfterImport(changes))

    def _patch_loading(self) -> None:
        """Let a network that loads "no weights" stay as it was initialized."""
        plain = nn.Module.load_state_dict

        def load_state_dict(module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            if self.asked and isinstance(state_dict, dict) and not state_dict and module.state_dict():
                self._remember(module)
                return nn.modules.module._IncompatibleKeys([], [])
            if self.compiled and any("_orig_mod." in str(name) for name in state_dict):  # torch.compile renames entries
                state_dict = {str(name).replace("_orig_mod.", ""): value for name, value in state_dict.items()}
            before = fingerprints(module)
            result = plain(module, state_dict, *args, **kwargs)
            self.loaded |= set(fingerprints(module)).difference(before)
            return result

        nn.Module.load_state_dict = load_state_dict  # type: ignore[assignment,method-assign]

    def _patch_timm(self, builder: types.ModuleType) -> None:
        def load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            self.asked.append(f"timm's for {type(model).__name__}")
            self._remember(model)

        builder.load_pretrained = load_pretrained  # type: ignore[attr-defined]

    def _patch_hugging_face(self, downloads: types.ModuleType) -> None:
        def hf_hub_download(repo_id: str, filename: str, *_: Any, **__: Any) -> str:
            path = Path("downloads", str(repo_id).replace("/", "--"), Path(filename).name).absolute()
            if path.name == "config.json" and (architecture := timm_architecture(str(repo_id))):
                self.asked.append(f"{filename} of {repo_id}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"architecture": architecture}))
                return str(path)
            if path.suffix not in WEIGHTS_SUFFIXES:
                raise ConnectionError(f"no network here: {filename} of {repo_id} cannot be downloaded")
            self.asked.append(f"{filename} of {repo_id}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_no_weights(path)
            return str(path)

        downloads.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]

    def _remember(self, module: nn.Module) -> None:
        self.random |= set(fingerprints(module))

    def origins(self, model: Any) -> dict[str, Any]:
        """Return what is known of a model's weight tensors: `kept` hold the random numbers that they got, `loaded` hold
        what load_state_dict gave them, of `weights` in all; and whether load_state_dict gave anything to any module."""
        own = fingerprints(model)
        return {"kept": sum(mark in self.random for mark in own), "weights": len(own),
                "loaded": sum(mark in self.loaded - self.random for mark in own), "loads": bool(self.loaded - self.random)}


def matrices(model: Any) -> list[torch.Tensor]:
    """Return a model's float tensors of two or more dimensions. Others begin as constants, so they give nothing away."""
    tensors = model.state_dict().values() if hasattr(model, "state_dict") else ()
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            and tensor.dim() > 1 and tensor.layout == torch.strided and not tensor.is_meta]


def fingerprints(model: Any) -> list[bytes]:
    """Return a digest of the shape and the float32 numbers of each weight tensor; none where foreign code hides them."""
    try:
        return [hashlib.blake2b(tensor.detach().float().cpu().contiguous().numpy().tobytes(),
                                salt=str(tuple(tensor.shape)).encode()[:16]).digest() for tensor in matrices(model)]
    except Exception:  # a state_dict method of foreign code may raise anything
        return []


def timm_architecture(repo_id: str) -> str | None:
    """Return the architecture that a repository of timm's names, such as "timm/resnet18.a1_in1k", where timm knows it."""
    owner, _, name = repo_id.partition("/")
    timm = sys.modules.get("timm")
    return name if owner == "timm" and timm is not None and timm.is_model(name) else None


def write_no_weights(path: Path) -> None:
    """Write a file of weights that holds none."""
    if path.suffix == ".safetensors":
        path.write_bytes((2).to_bytes(8, "little") + b"{}")
    else:
        torch.save({}, path)


def mend_int8_convolutions(convolutions: types.ModuleType) -> None:
    """Make torch's int8 convolutions complete after unpickling: their own `__setstate__` never initializes the module."""
    def new(kind: type[nn.Module], *_: Any, **__: Any) -> nn.Module:
        made = nn.Module.__new__(kind)
        nn.Module.__init__(made)
        return made

    convolutions._ConvNd.__new__ = new


class AfterImport:
    """An import hook: changes modules right after their import.

    Args:
        changes: module -> function that changes it.
    """

    def __init__(self, changes: dict[str, Callable[[types.ModuleType], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the module's own spec, whose loader changes the module after running it; None for other modules."""
        change = self.changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        plain = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            plain(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
