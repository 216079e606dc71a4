"""What a real DiffSynth-Studio gets from here outside of ``diffsynth.core.vram``, module by module.

Each function is called with one freshly run module, before anything has been imported from it.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from safemap import load_state_dict

from diffsynth_core_vram._load_model import load_model

_log = logging.getLogger("diffsynth_core_vram.route")


def _serve_file(module: Any) -> None:
    """``diffsynth.core.loader.file``: checkpoints are read by ``safemap``."""
    module.load_state_dict = load_state_dict
    module.load_keys_dict_from_bin = functools.partial(_keys_of_pickled, module)


def _keys_of_pickled(module: Any, file_path: str) -> Any:
    """Describe a pickled checkpoint, to recognise it by; no tensor of it is read."""
    return module.convert_state_dict_to_keys_dict(module.load_state_dict_from_bin(file_path, device="meta"))


def _serve_model(module: Any) -> None:
    """``diffsynth.core.loader.model``: models are loaded by this distribution.

    DeepSpeed's ZeRO 3 spreads parameters over processes while the model is built: that stays theirs.
    """
    theirs = module.load_model

    @functools.wraps(load_model)
    def load(*args: Any, **kwargs: Any) -> Any:
        chosen = theirs if module.is_deepspeed_zero3_enabled() else load_model
        return chosen(*args, **kwargs)

    module.load_model = load


def _serve_model_loader(module: Any) -> None:
    """``diffsynth.models.model_loader``: a map entry for a class that no longer exists is left out."""
    pool = module.ModelPool

    def fetch_module_map(self: Any, model_class: str, vram_config: dict[str, Any]) -> Any:
        if not self.need_to_enable_vram_management(vram_config):
            return None
        names = module.VRAM_MANAGEMENT_MODULE_MAPS.get(model_class)
        if names is None:
            return {self.import_model_class(model_class): module.AutoWrappedModule}
        if model_class in module.VERSION_CHECKER_MAPS:
            names = module.VERSION_CHECKER_MAPS[model_class]()
        module_map = {}
        for source, target in names.items():
            try:
                found = self.import_model_class(source)
            except (AttributeError, ImportError) as error:
                _log.warning("the module map of %s names %s: %s", model_class, source, error)
                continue
            module_map[found] = self.import_model_class(target)
        return module_map

    pool.fetch_module_map = fetch_module_map


def _serve_base_pipeline(module: Any) -> None:
    """``diffsynth.diffusion.base_pipeline``: models are switched on every device, the CPU included."""

    def load_models_to_device(self: Any, model_names: Sequence[str]) -> None:
        if not self.vram_management_enabled:
            return
        children = self.named_children()
        managed = [(name, m) for name, m in children if getattr(m, "vram_management_enabled", False)]
        for name, model in managed:
            if name not in model_names:
                _each_layer(model, "offload")
        empty_cache = getattr(getattr(torch, self.device_type, None), "empty_cache", None)
        if empty_cache is not None:  # torch.cpu has none
            empty_cache()
        for name, model in managed:
            if name in model_names:
                _each_layer(model, "onload")

    module.BasePipeline.load_models_to_device = load_models_to_device


def _each_layer(model: torch.nn.Module, method: str) -> None:
    for layer in [model] if hasattr(model, method) else model.modules():
        if hasattr(layer, method):
            getattr(layer, method)()


SERVED: dict[str, Callable[[ModuleType], None]] = {
    "diffsynth.core.loader.file": _serve_file,
    "diffsynth.core.loader.model": _serve_model,
    "diffsynth.models.model_loader": _serve_model_loader,
    "diffsynth.diffusion.base_pipeline": _serve_base_pipeline,
}
