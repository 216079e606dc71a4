"""Layouts that transformers, diffusers and training frameworks publish: lazy conversion equals eager.

The state dicts are synthetic: the names and the arithmetic of the layouts are real, the sizes are small.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import DiskMap
from torch import Tensor

StateDict = dict[str, Any]
HIDDEN, HEADS, GROUPS, HEAD = 16, 4, 2, 4


def _noise(**shapes: tuple[int, ...]) -> StateDict:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def _layers(count: int, shapes: dict[str, tuple[int, ...]], prefix: str) -> StateDict:
    return _noise(**{f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()})


# --- fused attention


def gpt_neox() -> StateDict:
    return _layers(2, {"attention.query_key_value.weight": (3 * HIDDEN, HIDDEN)}, "gpt_neox.layers")


def split_interleaved_heads(state_dict: StateDict) -> StateDict:
    """Rows are grouped per head as query, key, value."""
    result = {}
    for name, weight in state_dict.items():
        parts = weight.view(HEADS, 3, HEAD, HIDDEN).unbind(dim=1)
        for part, letter in zip(parts, "qkv", strict=True):
            result[name.replace("query_key_value", f"{letter}_proj")] = part.reshape(HIDDEN, HIDDEN)
    return result


def grouped_query() -> StateDict:
    return _layers(2, {"attn.wqkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN)}, "layers")


def split_groups(state_dict: StateDict) -> StateDict:
    """Rows are grouped per key head: its queries, one key, one value."""
    result = {}
    per_group = HEADS // GROUPS
    for name, weight in state_dict.items():
        groups = weight.reshape(GROUPS, per_group + 2, HEAD, HIDDEN)
        result[name.replace("wqkv", "wq")] = groups[:, :per_group].reshape(-1, HIDDEN)
        result[name.replace("wqkv", "wk")] = groups[:, per_group].reshape(-1, HIDDEN)
        result[name.replace("wqkv", "wv")] = groups[:, -1].reshape(-1, HIDDEN)
    return result


def llama() -> StateDict:
    shapes = {f"self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkv"}
    return _layers(2, {**shapes, "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}, "model.layers")


def fuse_qkv(state_dict: StateDict) -> StateDict:
    for name in [n for n in state_dict if ".q_proj." in n]:
        parts = [state_dict.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        state_dict[name.replace("q_proj", "qkv_proj")] = torch.cat(parts, dim=0)
    return state_dict


def permute_for_rotary(state_dict: StateDict) -> StateDict:
    """The order of rotary dimensions: pairs next to each other become halves."""

    def permute(weight: Tensor) -> Tensor:
        return weight.view(HEADS, HEAD // 2, 2, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)

    return {n: permute(w) if ".q_proj." in n or ".k_proj." in n else w for n, w in state_dict.items()}


def conv1d() -> StateDict:
    return _layers(2, {"attn.c_attn.weight": (HIDDEN, 3 * HIDDEN), "attn.c_attn.bias": (3 * HIDDEN,)}, "h")


def split_transposed(state_dict: StateDict) -> StateDict:
    result = {}
    for name, tensor in state_dict.items():
        for part, letter in zip(tensor.split(HIDDEN, dim=-1), "qkv", strict=True):
            result[name.replace("c_attn", letter)] = part.t().contiguous() if part.dim() == 2 else part
    return result


# --- mixtures of experts


def mixtral() -> StateDict:
    shapes = {f"experts.{e}.w{i}.weight": (8, HIDDEN) for e in range(4) for i in (1, 3)}
    shapes |= {f"experts.{e}.w2.weight": (HIDDEN, 8) for e in range(4)}
    return _layers(2, {**shapes, "gate.weight": (4, HIDDEN)}, "model.layers")


def stack_experts(state_dict: StateDict) -> StateDict:
    result = {}
    for i in range(2):
        prefix = f"model.layers.{i}."
        w1, w2, w3 = ([state_dict[f"{prefix}experts.{e}.w{j}.weight"] for e in range(4)] for j in (1, 2, 3))
        gate_up = [torch.cat(pair, dim=0) for pair in zip(w1, w3, strict=True)]
        result[prefix + "experts.gate_up_proj"] = torch.stack(gate_up).transpose(1, 2).contiguous()
        result[prefix + "experts.down_proj"] = torch.stack(w2)
        result[prefix + "gate.weight"] = state_dict[prefix + "gate.weight"]
    return result


def fill_experts(state_dict: StateDict) -> StateDict:
    result = {}
    for i in range(2):
        fused = torch.empty(4, 16, HIDDEN, dtype=torch.bfloat16)
        for e in range(4):
            fused[e, :8] = state_dict[f"model.layers.{i}.experts.{e}.w1.weight"]
            fused[e, 8:] = state_dict[f"model.layers.{i}.experts.{e}.w3.weight"]
        result[f"model.layers.{i}.experts.gate_up_proj"] = fused
    return result


def fused_experts() -> StateDict:
    return _layers(2, {"experts.gate_up_proj": (4, HIDDEN, 16)}, "model.layers")


def split_experts(state_dict: StateDict) -> StateDict:
    result = {}
    for name, fused in state_dict.items():
        for e, expert in enumerate(fused):
            gate, up = expert.chunk(2, dim=-1)
            result[f"{name}.{e}.gate.weight"], result[f"{name}.{e}.up.weight"] = gate.T, up.T.contiguous()
    return result


# --- single-file layouts of diffusers


def flux_single_file() -> StateDict:
    shapes: dict[str, tuple[int, ...]] = {
        "linear1.weight": (7 * HIDDEN, HIDDEN),
        "linear1.bias": (7 * HIDDEN,),
    }
    state_dict = _layers(2, shapes, "model.diffusion_model.single_blocks")
    return {
        **state_dict,
        **_noise(**{"model.diffusion_model.final_layer.adaLN.weight": (2 * HIDDEN, HIDDEN)}),
    }


def flux_to_diffusers(state_dict: StateDict) -> StateDict:
    for key in list(state_dict):
        state_dict[key.replace("model.diffusion_model.", "")] = state_dict.pop(key)
    shift, scale = state_dict.pop("final_layer.adaLN.weight").chunk(2, dim=0)
    result = {"norm_out.linear.weight": torch.cat([scale, shift], dim=0)}
    for i in range(2):
        for kind in ("weight", "bias"):
            sizes = (HIDDEN, HIDDEN, HIDDEN, 4 * HIDDEN)
            q, k, v, mlp = torch.split(state_dict.pop(f"single_blocks.{i}.linear1.{kind}"), sizes, dim=0)
            prefix = f"single_transformer_blocks.{i}."
            result[prefix + f"attn.to_q.{kind}"] = torch.cat([q])
            result[prefix + f"attn.to_k.{kind}"] = torch.cat([k])
            result[prefix + f"attn.to_v.{kind}"] = torch.cat([v])
            result[prefix + f"proj_mlp.{kind}"] = torch.cat([mlp])
    assert not state_dict
    return result


def ldm_vae() -> StateDict:
    convolutions = {
        f"decoder.mid.attn_1.{x}.weight": (HIDDEN, HIDDEN, 1, 1) for x in ("q", "k", "v", "proj_out")
    }
    ups = {f"decoder.up.{i}.block.0.conv1.weight": (HIDDEN, HIDDEN, 3, 3) for i in range(4)}
    return {"first_stage_model." + n: t for n, t in _noise(**convolutions, **ups).items()}


def ldm_vae_to_diffusers(state_dict: StateDict) -> StateDict:
    result = {}
    for name, weight in state_dict.items():
        name = name.removeprefix("first_stage_model.")
        if ".attn_1." in name:
            result[name.replace("mid.attn_1", "mid_block.attentions.0")] = weight[:, :, 0, 0]
        else:
            number = int(name.split(".")[2])
            result[name.replace(f"up.{number}.block", f"up_blocks.{3 - number}.resnets")] = weight
    return result


def open_clip() -> StateDict:
    names = {"attn.in_proj_weight": (3 * HIDDEN, HIDDEN), "attn.in_proj_bias": (3 * HIDDEN,)}
    return {
        **_layers(2, names, "transformer.resblocks"),
        **_noise(text_projection=(HIDDEN, HIDDEN), positional_embedding=(77, HIDDEN)),
    }


def open_clip_to_transformers(state_dict: StateDict) -> StateDict:
    result = {"text_projection.weight": state_dict["text_projection"].T.contiguous()}
    result["position_ids"] = torch.arange(state_dict["positional_embedding"].shape[0])[None]
    for name, tensor in state_dict.items():
        if "in_proj" in name:
            for i, letter in enumerate("qkv"):
                result[name.replace("in_proj", letter)] = tensor[i * HIDDEN : (i + 1) * HIDDEN, ...]
    return result


# --- arithmetic on weights


def weight_norm() -> StateDict:
    return _noise(weight_g=(8, 1), weight_v=(8, HIDDEN))


def fold_weight_norm(state_dict: StateDict) -> StateDict:
    v = state_dict["weight_v"].float()
    weight = state_dict["weight_g"].float() * v / v.norm(dim=1, keepdim=True)
    return {"weight": weight.to(torch.bfloat16)}


def gemma() -> StateDict:
    return _layers(2, {"input_layernorm.weight": (HIDDEN,)}, "model.layers")


def add_one(state_dict: StateDict) -> StateDict:
    for weight in state_dict.values():
        weight += 1
    return state_dict


LAYOUTS = [
    (gpt_neox, split_interleaved_heads),
    (grouped_query, split_groups),
    (llama, fuse_qkv),
    (llama, permute_for_rotary),
    (conv1d, split_transposed),
    (mixtral, stack_experts),
    (mixtral, fill_experts),
    (fused_experts, split_experts),
    (flux_single_file, flux_to_diffusers),
    (ldm_vae, ldm_vae_to_diffusers),
    (open_clip, open_clip_to_transformers),
    (weight_norm, fold_weight_norm),
    (gemma, add_one),
]


@pytest.mark.parametrize(
    ("layout", "converter"), LAYOUTS, ids=[f"{a.__name__}-{b.__name__}" for a, b in LAYOUTS]
)
def test_lazy_equals_eager(
    layout: Callable[[], StateDict], converter: Callable[[StateDict], StateDict], tmp_path: Path
) -> None:
    file = tmp_path / "model.pth"
    torch.save(layout(), file)
    eager = converter(layout())
    with DiskMap(file, state_dict_converter=converter, converter_read_limit=0) as lazy:
        assert list(lazy) == list(eager)
        for name, expected in eager.items():
            found = lazy[name]
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert torch.equal(lazy.read_into(name, torch.empty_like(expected)), expected)
            assert torch.equal(lazy.slice(name)[1:3], expected[1:3])
            assert found.untyped_storage().nbytes() <= found.nbytes + 64
