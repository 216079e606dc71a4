"""Every state-dict converter of the ``diffsynth`` distribution, unmodified: lazy equals eager, bit for bit.

The converter files are loaded one by one, without importing the package, which has dependencies that are not
installed.  What names a converter expects is found by watching it: names that it asks a dict for, and names
built from the string literals of its source.  A candidate stays if the converter runs with it.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import DiskMap
from torch import Tensor

try:
    _DISTRIBUTION = importlib.metadata.distribution("diffsynth")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(
        "the diffsynth distribution is not installed (nox -s diffsynth installs it)", allow_module_level=True
    )

_FOLDER = Path(str(_DISTRIBUTION.locate_file("diffsynth")))
_FILES = sorted((_FOLDER / "utils" / "state_dict_converters").glob("[!_]*.py"))

Converter = Callable[[dict[str, Any]], dict[str, Any]]

#: rows that a converter insists on, or by which it splits
_ROWS = {
    "MiniMaxH3ControlNetStateDictConverter": 7168,
    "SDXLTextEncoder2StateDictConverter_Original2Diffusers": 3840,
}
#: layouts of pickled files
_NESTED: dict[str, Any] = {
    "FluxInfiniteYouImageProjectorStateDictConverter": {"image_proj": ["latents", "proj_in.weight"]},
    "FluxIpAdapterStateDictConverter": {"image_proj": ["proj.weight"], "ip_adapter": ["0.to_k_ip.weight"]},
    "WanVideoVAEStateDictConverter": {"model_state": ["encoder.conv1.weight"]},
}
_QKV = [f"attn.{name}" for name in ("to_q", "to_k", "to_v")]
#: names that a converter needs together, or that its source does not spell out
_EXTRA = {
    "ImageMetricsImageRewardStateDictConverter": ["blip.text_encoder.embeddings.word_embeddings.weight"],
    "LTX25TextEncoderStateDictConverter": ["model.embed_tokens.weight"],
    "FluxDiTStateDictConverterFromDiffusers": [
        *(
            f"single_transformer_blocks.{i}.{n}.weight"
            for i in range(2)
            for n in [*_QKV, "proj_mlp"][: 4 - i]
        ),
        *(f"transformer_blocks.0.{n}.bias" for n in [*_QKV, *(f"attn.add_{x}_proj" for x in "qkv")]),
        "norm_out.linear.weight",
    ],
    "FluxControlNetStateDictConverter": [
        *(f"single_transformer_blocks.0.{n}.weight" for n in [*_QKV, "proj_mlp"]),
        *(f"transformer_blocks.0.{n}.bias" for n in [*_QKV, *(f"attn.add_{x}_proj" for x in "qkv")]),
    ],
    "MiniMaxH3ControlNetStateDictConverter": [
        f"control_blocks.0.{name}.weight"
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.0.proj", "ff.net.2", "norm1")
    ],
    "ImageMetricsOpenCLIPStateDictConverter": [
        f"{prefix}transformer.resblocks.1.{name}"
        for prefix in ("", "visual.")
        for name in ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "ln_1.bias")
    ],
}


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"converters_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _converters() -> Iterator[Any]:
    for path in _FILES:
        module = _load(path)
        for name, function in vars(module).items():
            if inspect.isfunction(function) and list(inspect.signature(function).parameters) == [
                "state_dict"
            ]:
                yield pytest.param(function, path.read_text(encoding="utf-8"), id=name)


class _Watched(dict[str, Any]):
    """A state dict that notes which names it is asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.asked[name] = None
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked[str(name)] = None
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked[name] = None
        return super().get(name, default)


def _tensors(names: list[str], rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.rand(rows, 4, generator=generator).to(torch.float16) for name in names}


def _literals(converter: Converter, source: str) -> tuple[list[str], list[str]]:
    """Return the strings in the source of a converter, and those that it compares names with."""
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    mine = functions[converter.__name__]
    others = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    strings: dict[str, None] = {}
    compared: dict[str, None] = {}
    for root in (mine, *others):
        for node in ast.walk(root):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 120:
                strings[node.value] = None
            parts: list[ast.expr] = []
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "startswith"
            ):
                parts = node.args
            elif isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            for part in parts:
                for leaf in ast.walk(part):
                    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                        compared[leaf.value] = None
    return list(strings), list(compared)


def _candidates(converter: Converter, source: str) -> list[str]:
    """Return names that the converter may expect, the likeliest first."""
    strings, compared = _literals(converter, source)
    names = [s for s in strings if " " not in s and not s.startswith((".", "_")) and not s.endswith(".")]
    found: dict[str, None] = dict.fromkeys(names)
    found.update(dict.fromkeys(f"{name}.weight" for name in names))
    tails = [s for s in strings if s and (s.startswith((".", "_")))]
    found.update(dict.fromkeys(f"a.0{tail.rstrip('.')}.weight" for tail in tails))
    found.update(
        dict.fromkeys(f"{name}{tail}" for name in names[:50] for tail in tails if tail.startswith("_"))
    )
    for prefix in [s for s in strings if s.endswith(".")] + [s + "." for s in compared if s]:
        found.update(dict.fromkeys(f"{prefix}{tail}" for tail in ("x.weight", "0.x.weight", "x.0.y.bias")))
    for prefix, name in itertools.product([s.rstrip(".") for s in compared], names[:60]):
        tails = [name, f"{name}.weight", f"0.{name}", f"0.{name}.weight", f"0.{name}.1.conv1.weight"]
        found.update(dict.fromkeys(f"{prefix}.{tail}" for tail in tails))
    return [name for name in found if name.isprintable()][:4000]


def _runs(converter: Converter, names: list[str], rows: int) -> tuple[bool, list[str]]:
    """Tell whether the converter runs with these names, and which names it asked for."""
    nested = _nested(converter)
    watched = _Watched({**_tensors(names, rows), **nested})
    try:
        converter(watched)
    except Exception:
        return False, [name for name in watched.asked if name not in nested]
    return True, [name for name in watched.asked if name not in nested]


def _nested(converter: Converter) -> dict[str, dict[str, Tensor]]:
    return {name: dict(_tensors(inners, 6)) for name, inners in _NESTED.get(converter.__name__, {}).items()}


def _accepted(converter: Converter, candidates: list[str], names: list[str], rows: int) -> list[str]:
    """Return *names* and those *candidates* with which the converter still runs."""
    if not candidates:
        return names
    if _runs(converter, names + candidates, rows)[0]:
        return names + candidates
    if len(candidates) == 1:
        return names
    half = len(candidates) // 2
    names = _accepted(converter, candidates[:half], names, rows)
    return _accepted(converter, candidates[half:], names, rows)


def _state_dict(converter: Converter, source: str) -> dict[str, Any]:
    """Return a state dict that exercises the converter."""
    rows = _ROWS.get(converter.__name__, 24)
    names = _EXTRA.get(converter.__name__, [])
    while True:  # what it asks for may depend on what it found
        runs, asked = _runs(converter, names, rows)
        new = [name for name in asked if name not in names]
        if not new:
            break
        names = names + new
    assert runs, f"it needs other names than {names}"
    if rows <= 24:
        candidates = [name for name in _candidates(converter, source) if name not in names]
        names = _accepted(converter, candidates, names, rows)
    return dict(_tensors(names, rows))


def _same(lazy: Any, eager: Any) -> bool:
    if isinstance(eager, Tensor):
        return (
            type(lazy) is Tensor
            and lazy.dtype == eager.dtype
            and lazy.shape == eager.shape
            and torch.equal(lazy.contiguous().view(torch.uint8), eager.contiguous().view(torch.uint8))
        )
    return lazy is eager


@pytest.fixture(autouse=True)
def image_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """One converter imports a model of its package; give it that file alone, with what it imports stubbed."""
    source = (_FOLDER / "models" / "image_reward.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    model = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ImageRewardModel")
    method = next(n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == "convert_key_value")
    method.decorator_list = []
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module([method], []), "image_reward.py", "exec"), namespace)
    model_class = type(
        "ImageRewardModel", (), {"convert_key_value": staticmethod(namespace["convert_key_value"])}
    )
    names = ("diffsynth", "diffsynth.models", "diffsynth.models.image_reward")
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[names[-1]].ImageRewardModel = model_class  # type: ignore[attr-defined]


ALL = list(_converters())


def test_the_distribution_has_converters() -> None:
    assert len(ALL) >= 80


@pytest.mark.slow
@pytest.mark.parametrize(("converter", "source"), ALL)
def test_lazy_equals_eager(converter: Converter, source: str, tmp_path: Path) -> None:
    state_dict = _state_dict(converter, source)
    nested = _nested(converter)
    file = tmp_path / "model.pth"
    torch.save({**state_dict, **nested}, file)
    eager = converter({**state_dict, **nested})
    assert eager, "the converter gave nothing: its names were not found"
    with DiskMap(file, state_dict_converter=converter, converter_read_limit=0) as lazy:
        assert list(lazy) == list(eager)
        wrong = [name for name in eager if not _same(lazy[name], eager[name])]
        assert not wrong
        for name, value in eager.items():
            if isinstance(value, Tensor):
                info = lazy.info(name)
                assert (info.dtype, info.shape) == (value.dtype, value.shape)
