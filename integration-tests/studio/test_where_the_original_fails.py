"""What goes wrong in DiffSynth-Studio's own ``core.vram`` and does not here, as the documentation lists it.

Each test does the same with both, on the CPU, and says of both what happens.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffsynth_core_vram
import pytest
import torch
from configurations import CONFIGURATIONS, limit_of
from safetensors.torch import save_file
from studio_case import Case
from studio_cases import CASES
from test_models import onload, rounded
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

Load = Callable[..., nn.Module]


@pytest.fixture
def ours(pool: Any) -> Load:
    """Load a case as a routed DiffSynth-Studio does."""

    def load(case: Case, path: Any, configuration: str, **kwargs: Any) -> nn.Module:
        vram_config = CONFIGURATIONS[configuration](case.dtype)
        module_map = pool.fetch_module_map(case.model_class, vram_config)
        with case.small() as model_class:
            return diffsynth_core_vram.load_model(
                model_class, path, case.config, case.dtype, use_disk_map=True, module_map=module_map,
                vram_config=vram_config, vram_limit=limit_of(configuration, 1), **kwargs,
            )  # fmt: skip

    return load


@pytest.fixture
def theirs(pool: Any, original: Any, original_load_model: Load) -> Load:
    """Load a case as DiffSynth-Studio does by itself."""

    def load(case: Case, path: Any, configuration: str, **kwargs: Any) -> nn.Module:
        vram_config = CONFIGURATIONS[configuration](case.dtype)
        module_map = pool.fetch_module_map(case.model_class, vram_config)
        module_map = {k: getattr(original.layers, v.__name__) for k, v in module_map.items()}
        with case.small() as model_class:
            model = original_load_model(
                model_class, path, dict(case.config), case.dtype, use_disk_map=True, module_map=module_map,
                vram_config=vram_config, vram_limit=limit_of(configuration, 1), **kwargs,
            )  # fmt: skip
        return model

    return load


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_rotary_tables_keep_their_precision(ours: Load, theirs: Load, saved: Any) -> None:
    case = CASES["qwen-image-text-encoder"]
    plain = case.build()
    path = saved(plain)
    positions = torch.arange(1000).expand(3, 1, 1000)

    def table(model: Any) -> Tensor:
        rotary = model.model.language_model.rotary_emb
        cosine, _ = rotary(torch.zeros(1, 1000, 8), positions)
        assert isinstance(cosine, Tensor)
        return cosine

    expected = table(plain)
    mine, other = ours(case, path, "fp8 storage"), theirs(case, path, "fp8 storage")
    onload(other)
    assert torch.equal(table(mine), expected)
    assert distance(table(other), expected) > 0.1


@pytest.mark.parametrize("name", ["ltx", "flux-clip"])
def test_parameters_that_no_layer_manages_keep_their_dtype(
    name: str, ours: Load, theirs: Load, pool: Any, saved: Any
) -> None:
    case = CASES[name]
    plain = case.build()
    path = saved(plain)
    module_map = pool.fetch_module_map(case.model_class, CONFIGURATIONS["fp8 storage"](case.dtype))
    expected = case.run(rounded(plain, module_map))
    model = theirs(case, path, "fp8 storage")
    onload(model)
    assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters(recurse=False))
    assert distance(case.run(model), expected) > 0.001
    assert torch.equal(case.run(ours(case, path, "fp8 storage")), expected)


@pytest.mark.parametrize(
    ("name", "configuration", "error"),
    [
        ("ernie-image", "fp8 storage", RuntimeError),  # takes the dtype of a weight for the layer's
        ("moss-text-encoder", "fp8 storage", NotImplementedError),  # calls a convolution by its weight
        ("lingbot-video", "disk, preparing", NotImplementedError),  # multiplies with the weights of experts
    ],
)
def test_a_parent_reads_the_weights_of_a_layer(
    name: str, configuration: str, error: type[Exception], ours: Load, theirs: Load, saved: Any
) -> None:
    case = CASES[name]
    path = saved(case.build())
    case.run(ours(case, path, configuration))  # test_models.py compares what it computes
    model = theirs(case, path, configuration)
    onload(model)
    with pytest.raises(error):
        case.run(model)


def test_parameters_beside_layers_leave_memory(ours: Load, theirs: Load, saved: Any) -> None:
    case = CASES["lingbot-video"]
    path = saved(case.build())

    def left(model: nn.Module) -> dict[str, int]:
        for method in ("onload", "offload"):
            onload(model, method)
        held = {}
        for prefix, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    held[f"{prefix}.{name}"] = parameter.nbytes
        return held

    total = sum(p.nbytes for p in case.build().parameters())
    assert left(ours(case, path, "disk, memory")) == {}
    assert sum(left(theirs(case, path, "disk, memory")).values()) > 0.1 * total


def test_buffers_that_a_file_has_are_read(original: Any, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(plain[1].running_mean)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 4, 4)
    config = CONFIGURATIONS["disk, preparing"](torch.float32)

    def load(vram: Any, layer: Any) -> nn.Module:
        with vram.skip_model_initialization():
            model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        disk_map = vram.DiskMap(str(tmp_path / "model.safetensors"), "cpu")
        module_map = {nn.Conv2d: layer, nn.BatchNorm2d: layer}
        vram.enable_vram_management(model, module_map, config, disk_map=disk_map)
        onload(model)
        return model

    assert torch.equal(load(diffsynth_core_vram, diffsynth_core_vram.AutoWrappedModule)(x), plain(x))
    with pytest.raises(RuntimeError, match="running_mean"):
        load(original, original.layers.AutoWrappedModule)(x)


@pytest.mark.parametrize("configuration", ["cpu offload", "disk, memory"])
def test_low_rank_changes_are_fused_into_managed_models(
    configuration: str, ours: Load, theirs: Load, saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffsynth.utils.lora import GeneralLoRALoader

    case = CASES["wan"]
    plain = case.build()
    path = saved(plain)
    lora = {}
    for i in range(2):
        lora[f"blocks.{i}.self_attn.q.lora_A.weight"] = torch.randn(2, 48).bfloat16()
        lora[f"blocks.{i}.self_attn.q.lora_B.weight"] = torch.randn(48, 2).bfloat16()
    loader = GeneralLoRALoader("cpu", torch.bfloat16)
    before = case.run(plain)
    mine, other = ours(case, path, configuration), theirs(case, path, configuration)
    onload(other)
    fused = []
    for model in (plain, mine, other):
        loader.fuse_lora_to_base_model(model, lora)
        fused.append(capsys.readouterr().out.split()[0])
    assert fused == ["2", "2", "0"]
    assert torch.equal(case.run(mine), case.run(plain))
    assert torch.equal(case.run(other), before)  # without a word, nothing has happened


def test_low_rank_changes_learn_on_managed_models(ours: Load, theirs: Load, saved: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    case = CASES["wan"]
    path = saved(case.build())

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        onload(model)
        model.requires_grad_(False)
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q", "o"], init_lora_weights=False), model)
        learning = [p for n, p in model.named_parameters() if "lora_" in n]
        for parameter in learning:
            parameter.data = parameter.data.bfloat16()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        case.call(model, draw).sum().backward()
        return {
            n.replace(".module", ""): p.grad
            for n, p in model.named_parameters()
            if "lora_" in n and p.grad is not None
        }

    expected = gradients(case.build())
    found = gradients(ours(case, path, "disk, preparing"))
    assert len(expected) == 16
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    in_blocks = [n for n in gradients(theirs(case, path, "fp8 storage")) if n.startswith("blocks")]
    assert len(in_blocks) < len(expected)


def test_a_limit_holds_on_the_cpu(ours: Load, theirs: Load, saved: Any) -> None:
    case = CASES["qwen-image"]
    path = saved(case.build())
    assert torch.equal(case.run(ours(case, path, "disk")), case.run(case.build()))
    model = theirs(case, path, "disk")
    onload(model)
    with pytest.raises(AttributeError, match="mem_get_info"):
        case.run(model)


def test_models_are_switched_on_the_cpu() -> None:
    from diffsynth.diffusion import base_pipeline

    spec = importlib.util.spec_from_file_location("diffsynth.diffusion.original", base_pipeline.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for pipeline_class, fails in ((base_pipeline.BasePipeline, False), (module.BasePipeline, True)):
        pipe = pipeline_class(device="cpu")
        pipe.vram_management_enabled = True
        if fails:
            with pytest.raises(AttributeError, match="empty_cache"):
                pipe.load_models_to_device([])
        else:
            pipe.load_models_to_device([])


def test_a_model_runs_before_it_is_sent_anywhere(ours: Load, theirs: Load, saved: Any) -> None:
    case = CASES["qwen-image"]
    path = saved(case.build())
    assert torch.equal(case.run(ours(case, path, "disk, memory")), case.run(case.build()))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        case.run(theirs(case, path, "disk, memory"))


def test_a_module_map_may_name_a_class_that_is_gone(pool: Any) -> None:
    from diffsynth.models import model_loader

    spec = importlib.util.spec_from_file_location("diffsynth.models.original", model_loader.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model_class = CASES["qwen-image-text-encoder"].model_class
    vram_config = CONFIGURATIONS["cpu offload"](torch.bfloat16)
    assert len(pool.fetch_module_map(model_class, vram_config)) > 3
    with pytest.raises(AttributeError, match="Qwen2_5_VisionRotaryEmbedding"):
        module.ModelPool().fetch_module_map(model_class, vram_config)


@pytest.mark.parametrize(
    ("configuration", "error"), [("cpu offload", RuntimeError), ("disk, preparing", KeyError)]
)
def test_tied_parameters_are_found_under_one_name(
    configuration: str, error: type[Exception], ours: Load, theirs: Load, saved: Any
) -> None:
    case = CASES["t5"]
    plain = case.build()
    path = saved(plain)
    model = ours(case, path, configuration)
    if configuration == "cpu offload":
        assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()
    assert torch.equal(case.run(model), case.run(plain))
    with pytest.raises(error, match="embed_tokens"):
        case.run(theirs(case, path, configuration))


def test_converters_may_compute(ours: Load, theirs: Load, tmp_path: Path) -> None:
    case = CASES["qwen-image"]
    plain = case.build()
    state = plain.state_dict()
    fused = {}
    for name, tensor in state.items():
        if name.endswith("to_q.weight"):
            parts = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            fused[name.replace("to_q", "to_qkv")] = torch.cat(parts)
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            fused[name] = tensor
    save_file(fused, tmp_path / "model.safetensors")

    def split(state_dict: Any) -> dict[str, Any]:
        out = {}
        for name in state_dict:
            if "to_qkv" in name:
                for part, tensor in zip(("to_q", "to_k", "to_v"), state_dict[name].chunk(3), strict=True):
                    out[name.replace("to_qkv", part)] = tensor
            else:
                out[name] = state_dict[name]
        return out

    path = str(tmp_path / "model.safetensors")
    model = ours(case, path, "disk", state_dict_converter=split)
    assert torch.equal(case.run(model), case.run(plain))
    with pytest.raises(AttributeError, match="chunk"):  # it is called with names in place of tensors
        theirs(case, path, "disk", state_dict_converter=split)


def test_one_device_may_be_written_in_two_ways(original: Any) -> None:
    config = CONFIGURATIONS["cpu offload"](torch.float32)
    config["computation_device"] = torch.device("cpu")

    def copied(layer_class: Any) -> bool:
        layer = layer_class(nn.Linear(8, 8), **config)
        layer.onload()
        weight, _ = layer.computation()
        return bool(weight.data_ptr() != layer.weight.data_ptr())

    assert not copied(diffsynth_core_vram.AutoWrappedLinear)
    assert copied(original.layers.AutoWrappedLinear)


def test_the_original_is_not_ours(original: Any) -> None:
    """The comparisons above compare two things."""
    import diffsynth.core.vram.layers

    assert "diffsynth_core_vram" in diffsynth.core.vram.layers.__file__
    assert "diffsynth_core_vram" not in original.layers.__file__
    assert diffsynth.core.vram.AutoWrappedLinear is diffsynth_core_vram.AutoWrappedLinear
    assert original.AutoWrappedLinear is not diffsynth_core_vram.AutoWrappedLinear
    copy.deepcopy(original.AutoWrappedLinear(nn.Linear(2, 2), computation_device="cpu"))
