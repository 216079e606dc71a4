"""State-dict converters as people write them: what they see, what is read,what goes wrong."""

import copy
import logging
import operator
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import ConverterError, DiskMap, MismatchError, MissingTensorError
from safemap._file import File
from safemap.testing import assert_same
from torch import Tensor, nn

StateDict = dict[str, Any]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("q", "k", "v", "w")
    return {name: torch.rand(6, 4, generator=generator) for name in names} | {"flag": torch.ones(3)}


@pytest.fixture
def file(tmp_path: Path, save: Callable[..., str]) -> str:
    return save(tmp_path / "model.safetensors", tensors())


def check(file: str, converter: Callable[[StateDict], StateDict], limit: int | None = 0) -> None:
    """Compare with the eager conversion; with the default limit nothing may be read while converting."""
    eager = converter(tensors())
    with DiskMap(file, state_dict_converter=converter, converter_read_limit=limit) as lazy:
        assert list(lazy) == list(eager)
        for name, expected in eager.items():
            assert_same(lazy[name], expected.detach())


# ---------------------------------------------------------------------- what a converter sees


@pytest.mark.slow
def test_it_sees_a_dict(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        assert type(state_dict) is dict
        assert len(state_dict) == 5
        assert "q" in state_dict
        assert state_dict.get("absent") is None
        assert state_dict.pop("absent", 3) == 3
        del state_dict["flag"]
        state_dict["fused"] = torch.cat([state_dict.pop(name) for name in ("q", "k", "v")])
        state_dict.update({name + ".T": value.T for name, value in list(state_dict.items())})
        state_dict["w"] = state_dict["w"][:2]
        return dict(sorted({**state_dict}.items()))

    check(file, converter)


def test_it_sees_tensors(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        q = state_dict["q"]
        assert isinstance(q, torch.Tensor)
        assert (q.shape, q.dtype, q.device) == ((6, 4), torch.float32, torch.device("cpu"))
        assert (q.numel(), q.nbytes, q.dim(), len(q), q.stride()) == (24, 96, 2, 6, (4, 1))
        assert q.is_contiguous()
        assert not q.T.is_contiguous()
        assert not q.requires_grad
        assert state_dict["q"] is q
        assert q in {q: 1}
        assert "shape" in repr(q) or "tensor" in repr(q)
        return {"q": q, "p": nn.Parameter(q.T, requires_grad=False)}

    check(file, converter)


def test_a_deep_copy_is_independent(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        before = copy.deepcopy(state_dict)
        state_dict["q"].mul_(2)
        before["view"], before["same"] = before["q"][1:], copy.copy(before["k"])
        return {**dict(sorted(before.items())), "after": state_dict["q"]}

    check(file, converter)


@pytest.mark.slow
def test_a_write_through_a_view_is_seen_in_what_it_is_a_view_of(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        row = state_dict["q"][1]
        early = state_dict["q"] + 0
        row.fill_(7)
        state_dict["q"].view(-1)[2:5] += 1
        return {"q": state_dict["q"], "row": row, "early": early}

    check(file, converter)


def test_it_may_fill_a_new_tensor_part_by_part(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        fused = torch.empty(18, 4)
        for i, name in enumerate(("q", "k", "v")):
            fused[6 * i : 6 * i + 6] = state_dict[name]
        padded = torch.zeros((8, 4), dtype=torch.float16)
        padded[:6] = state_dict["w"]
        return {"fused": fused, "padded": padded, "ones": torch.ones(2, 2), "full": torch.full((3,), 5)}

    check(file, converter)


@pytest.mark.slow
def test_it_may_write_more_often_than_python_can_recurse(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        for _ in range(1500):
            state_dict["q"].add_(1)
        return {"q": state_dict["q"]}

    check(file, converter)
    with DiskMap(file, state_dict_converter=converter) as lazy, pickle.loads(pickle.dumps(lazy)) as again:
        assert_same(again["q"], lazy["q"])


def test_data_that_is_replaced(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        before = state_dict["q"][0]
        state_dict["q"].data = state_dict["k"].data[:2].T  # shares its memory from now on
        state_dict["q"].mul_(2)
        state_dict["v"].data = torch.arange(10)[::5][:1]
        state_dict["flag"].data = state_dict["flag"].data.half()
        with torch.device("meta"):
            linear = nn.Linear(4, 6, bias=False)
        linear.load_state_dict({"weight": state_dict["w"]}, assign=True)
        found = {**state_dict, "before": before, **linear.bfloat16().state_dict()}
        return dict(sorted(found.items()))

    check(file, converter)


def test_data_of_a_real_parameter(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        linear = nn.Linear(4, 6, bias=False)
        linear.weight.data = state_dict["q"]
        return {"twice": linear.weight.detach() * 2, **linear.half().state_dict()}

    check(file, converter, limit=None)


@pytest.mark.parametrize(
    "write",
    [lambda q: q.conj().zero_(), lambda q: (q.mH, q[0].mul_(2)), lambda q: (q.mH, operator.iadd(q, 1))],
    ids=["to the view", "to its base", "by an operator"],
)
def test_a_write_that_a_conjugate_view_would_share_is_refused(
    file: str, write: Callable[[Tensor], Any]
) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        q = torch.view_as_complex(state_dict["q"].view(6, 2, 2))
        q.conj().clone().zero_()
        write(q)
        return {"q": q}

    with pytest.raises(ConverterError, match=r'on .*"q", which writes to .* a conjugate or negative view'):
        DiskMap(file, state_dict_converter=converter)


def test_in_place_changes_of_shape(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        # a product with a vector squeezes a temporary in place
        product = state_dict["flag"] @ torch.ones(3, 2)
        return {"t": state_dict["q"].detach().t_(), "s": state_dict["k"][:1].squeeze_(), "product": product}

    check(file, converter)


def test_a_converter_that_uses_threads(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        made: StateDict = {}

        def double(name: str) -> None:
            made[name] = state_dict[name] * 2

        threads = [threading.Thread(target=double, args=[name]) for name in ("q", "k", "v")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return dict(sorted(made.items()))

    check(file, converter)


def test_a_module_imported_by_a_converter_gets_real_tensors(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "has_a_constant.py").write_text("import torch\nTABLE = torch.zeros(3)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def converter(state_dict: StateDict) -> StateDict:
        import has_a_constant  # type: ignore[import-not-found]

        assert type(has_a_constant.TABLE) is Tensor
        return {"q": state_dict["q"]}

    check(file, converter)


def test_another_map_read_by_a_converter(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        with DiskMap(file) as other:
            return {"sum": state_dict["q"] + other["k"], "plain": other["v"]}

    check(file, converter)


# ---------------------------------------------------------------------- names


def test_a_converter_of_names(file: str) -> None:
    def converter(names: dict[str, str]) -> dict[str, str]:
        return {value.replace("q", "query"): value for value in names.values() if not value.startswith("f")}

    with DiskMap(file, state_dict_converter=converter) as lazy:
        assert set(lazy) == {"query", "k", "v", "w"}
        assert_same(lazy["query"], tensors()["q"])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("q", "query"),
        lambda name: name.split(".")[0].strip(),  # tensors have a method of this name
        lambda name: "model." + name,
        lambda name: name + ".weight",
        lambda name: re.sub("^", "model.", name),
        lambda name: "/".join([name, "weight"]),
        lambda name: str.upper(name),
        lambda name: name if name == "q" else name.upper(),
    ],
    ids=["replace", "split", "after", "before", "re", "join", "descriptor", "compared"],
)
def test_what_a_converter_of_names_may_do(file: str, rename: Callable[[str], str]) -> None:
    with DiskMap(file, state_dict_converter=lambda s: {rename(name): name for name in s.values()}) as lazy:
        assert set(lazy) == {rename(name) for name in tensors()}
        assert_same(lazy[rename("q")], tensors()["q"])


def _only_tensors(change: Callable[[Any], Any]) -> Callable[[StateDict], StateDict]:
    return lambda state_dict: {
        key.strip(): change(value) if isinstance(value, Tensor) else value
        for key, value in state_dict.items()
    }


def _strips_names(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value.float().clone(memory=1)


@pytest.mark.parametrize(
    ("converter", "message"),
    [
        (_only_tensors(lambda value: value.transpos(0, 1) if value.dim() == 2 else value), "'transpos'"),
        (_only_tensors(lambda value: value.replace("a", "b")), "'replace'"),
        (_only_tensors(lambda value: value.clone(memory=1)), "unexpected keyword argument 'memory'"),
        (_only_tensors(lambda value: value.transpose("0", 1)), "must be int, not str"),
        (
            lambda s: {k: v.clone(memory=1) if hasattr(v, "shape") else v for k, v in s.items()},
            "unexpected keyword argument 'memory'",
        ),
        (
            lambda s: {k: _strips_names(v) for k, v in s.items()},
            "unexpected keyword argument 'memory'",
        ),
    ],
    ids=["no attribute", "a string's", "no argument", "wrong argument", "asked for a shape", "for both"],
)
def test_a_mistake_is_not_hidden_by_a_second_call_with_names(
    file: str, converter: Callable[[StateDict], StateDict], message: str
) -> None:
    with pytest.raises(ConverterError, match=message):
        DiskMap(file, state_dict_converter=converter)


def test_a_converter_that_returns_keys_in_place_of_values(file: str) -> None:
    with DiskMap(file, state_dict_converter=lambda names: {"model." + name: name for name in names}) as lazy:
        assert_same(lazy["model.q"], tensors()["q"])


def test_parts_of_a_name_are_no_parts_of_a_tensor(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        return {"part": state_dict["q"][:1280], "bad": state_dict["q"].absent or ""}

    with pytest.raises(ConverterError, match="absent"):
        DiskMap(file, state_dict_converter=converter)


# ---------------------------------------------------------------------- values


def test_values_are_read_when_they_are_needed_and_logged(file: str, caplog: pytest.LogCaptureFixture) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        big = [name for name in ("q", "k") if state_dict[name].mean() > 0]
        first = state_dict["flag"].tolist()[0]
        assert float(state_dict["flag"][0]) == first == state_dict["flag"].numpy()[0]
        assert f"{state_dict['flag'][0]:.1f}" == "1.0"
        chosen = state_dict["q"][state_dict["q"][:, 0] > 0.5]
        return {"all": torch.cat([state_dict[name] for name in big]) * first, "chosen": chosen}

    with caplog.at_level(logging.INFO, "safemap.converter"):
        check(file, converter, limit=None)
    lines = [record.getMessage() for record in caplog.records]
    assert any('reads tensor "flag" (12 bytes) while it runs, for tolist' in line for line in lines)
    assert all("converter" in line for line in lines)


def test_what_may_be_read_can_be_limited(file: str) -> None:
    def by_value(state_dict: StateDict) -> StateDict:
        return {"q": state_dict["q"] if state_dict["w"].mean() > 0 else state_dict["k"]}

    with pytest.raises(ConverterError) as caught:
        DiskMap(file, state_dict_converter=by_value, converter_read_limit=95)
    assert 'by_value needs the values of a tensor of shape [] made of "w"' in str(caught.value)
    assert "for aten._local_scalar_dense.default; that takes 96 bytes, 96 in all, and it may read 95" in str(
        caught.value
    )
    DiskMap(file, state_dict_converter=by_value, converter_read_limit=96).close()


def test_random_numbers_are_drawn_once(file: str) -> None:
    with DiskMap(file, state_dict_converter=lambda s: {"noise": torch.randn_like(s["q"])}) as lazy:
        assert_same(lazy["noise"], lazy["noise"])


def test_what_is_written_at_random_may_be_what_says_how(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        torch.manual_seed(0)
        return {"q": state_dict["q"].bernoulli_(state_dict["q"])}

    check(file, converter, limit=None)


def test_a_mask_for_a_real_tensor(file: str) -> None:
    check(file, lambda s: {"eye": torch.eye(6)[s["q"][:, 0] > 0.5]}, limit=None)


def test_a_constant_is_taken_as_it_was(file: str) -> None:
    constant = torch.ones(4)

    def converter(state_dict: StateDict) -> StateDict:
        result = {"sum": state_dict["q"] + constant}
        constant.fill_(5)
        return result

    with DiskMap(file, state_dict_converter=converter) as lazy:
        assert_same(lazy["sum"], tensors()["q"] + 1)


def test_a_real_tensor_that_is_written_to_gets_values(file: str) -> None:
    outside = torch.zeros(6, 4)
    with DiskMap(file, state_dict_converter=lambda s: {"x": outside.copy_(s["q"])}) as lazy:
        assert_same(outside, tensors()["q"])
        assert_same(lazy["x"], outside)


# ---------------------------------------------------------------------- errors


def test_a_failing_converter_is_named_with_operation_and_tensor(file: str) -> None:
    def mistaken(state_dict: StateDict) -> StateDict:
        return {"x": state_dict["q"].view(5, 5)}

    with pytest.raises(ConverterError) as caught:
        DiskMap(file, state_dict_converter=mistaken)
    assert 'mistaken failed at aten.view.default on tensor "q": RuntimeError' in str(caught.value)


def test_a_missing_name_is_told(file: str) -> None:
    with pytest.raises(ConverterError, match="failed: KeyError: 'absent'"):
        DiskMap(file, state_dict_converter=lambda s: {"x": s["absent"]})


@pytest.mark.parametrize("call", [Tensor.data_ptr, Tensor.untyped_storage], ids=["data_ptr", "storage"])
def test_an_address_is_refused(file: str, call: Callable[[Tensor], object]) -> None:
    method = call.__name__
    with pytest.raises(ConverterError, match=method + r'\(\) on tensor "q", which is not in memory yet'):
        DiskMap(file, state_dict_converter=lambda s: {"x": getattr(s["q"], method)()})


def test_resizing_memory_is_refused(file: str) -> None:
    with pytest.raises(ConverterError, match="changes the memory of a tensor"):
        DiskMap(file, state_dict_converter=lambda s: {"x": s["q"].resize_(2, 2)})


def test_an_error_in_a_later_run_names_converter_operation_and_tensors(file: str) -> None:
    def mistaken(state_dict: StateDict) -> StateDict:
        return {"x": state_dict["q"] @ state_dict["k"].T.double()}

    with DiskMap(file, state_dict_converter=mistaken) as lazy:
        with pytest.raises(ConverterError) as caught:
            lazy["x"]
        assert lazy.info("x").shape == (6, 6)
    message = str(caught.value)
    assert message.startswith("aten.mm.default, which the state_dict_converter ")
    assert 'mistaken applied to "q", "k", failed when it was run: RuntimeError: expected m1 and m2' in message


def test_an_unknown_name_is_a_key_error(file: str) -> None:
    with DiskMap(file, state_dict_converter=lambda s: {"query": s["q"] * 2}) as lazy:
        with pytest.raises(MissingTensorError):
            lazy["q"]
        with pytest.raises(MissingTensorError):
            lazy.tensors(["query", "q"])


# ---------------------------------------------------------------------- the map


def fused(state_dict: StateDict) -> StateDict:
    qkv = torch.cat([state_dict[name] for name in ("q", "k", "v")])
    w = state_dict["w"]
    return {"qkv": qkv, "double": w * 2, "half": w[3:], "zeros": torch.zeros(2, 3)}


def test_info_tells_the_cost_of_reading(file: str) -> None:
    with DiskMap(file, state_dict_converter=fused) as lazy:
        costs = {name: lazy.info(name).nbytes for name in lazy}
        assert costs == {"qkv": 288, "double": 96, "half": 48, "zeros": 0}
        assert {name: lazy.nbytes(name) for name in lazy} == costs
        assert lazy.info("qkv").file == file
        assert lazy.info("half").offset == DiskMap(file).info("w").offset + 48  # type: ignore[operator]
        assert (lazy.info("zeros").dtype, lazy.info("zeros").shape) == (torch.float32, (2, 3))


def test_a_slice_of_a_concatenation_reads_only_its_bytes(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = File.read_into

    def counted(self: File, view: memoryview, offset: int) -> None:
        nonlocal read
        read += len(view)
        original(self, view, offset)

    monkeypatch.setattr(File, "read_into", counted)
    expected = fused(tensors())["qkv"]
    with DiskMap(file, state_dict_converter=fused) as lazy:
        assert read == 0
        assert_same(lazy.slice("qkv")[5:7], expected[5:7])
        assert read == 2 * 16
        assert_same(lazy.slice("qkv")[::3, 1:2], expected[::3, 1:2])
        assert_same(lazy.slice("double")[5:7], fused(tensors())["double"][5:7])


def test_read_into_converts_and_checks(file: str) -> None:
    expected = fused(tensors())["qkv"]
    with DiskMap(file, state_dict_converter=fused) as lazy:
        assert_same(lazy.read_into("qkv", torch.empty(18, 4, dtype=torch.bfloat16)), expected.bfloat16())
        assert_same(lazy.read_into("qkv", torch.empty(4, 18).T), expected)
        with pytest.raises(MismatchError, match=r"has shape \[18, 4\]; the destination has \[4, 18\]"):
            lazy.read_into("qkv", torch.empty(4, 18))


def test_torch_dtype_is_that_of_results(file: str) -> None:
    eager = {name: value.to(torch.bfloat16) for name, value in fused(tensors()).items()}
    with DiskMap(file, torch_dtype=torch.bfloat16, state_dict_converter=fused) as lazy:
        for name, expected in eager.items():
            assert_same(lazy[name], expected)
            assert lazy.info(name).dtype == torch.float32


def numbers(state_dict: StateDict) -> StateDict:
    w = state_dict["w"]
    integers = (w * 100).to(torch.int32)
    return {
        "product": w @ w.T,
        "softmax": w.bfloat16().softmax(-1),
        "half": integers / 2,
        "scaled": integers * 1.7,
        "exp": (integers % 8).exp(),
        "flags": (w > 0.5) * 0.3,
        "complex": integers * 1.5j,
        "filled": w.clone().add_(integers),
    }


def test_reading_does_not_depend_on_autocast(file: str) -> None:
    eager = numbers(tensors())
    with DiskMap(file, state_dict_converter=numbers) as lazy, torch.autocast("cpu", dtype=torch.bfloat16):
        found = {name: lazy[name] for name in lazy}
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # it is on again
    for name, expected in eager.items():
        assert_same(found[name], expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_reading_does_not_depend_on_the_default_dtype(file: str, default: torch.dtype) -> None:
    eager = numbers(tensors())
    with DiskMap(file, state_dict_converter=numbers) as lazy:
        again = pickle.dumps(lazy)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(default)
            found = [{name: opened[name] for name in opened} for opened in (lazy, pickle.loads(again))]
        finally:
            torch.set_default_dtype(before)
    for name, expected in eager.items():
        for values in found:
            assert_same(values[name], expected)


def test_pickling_carries_what_was_recorded(file: str) -> None:
    with DiskMap(file, state_dict_converter=lambda s: fused(s)) as lazy:  # a lambda cannot be pickled
        again = pickle.loads(pickle.dumps(lazy))
        assert list(again) == list(lazy)
        for name in lazy:
            assert_same(again[name], lazy[name])
            assert again.info(name) == lazy.info(name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.bool, torch.complex64], ids=str)
def test_pickling_of_what_is_not_in_the_file(dtype: torch.dtype, file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        constant = torch.arange(6).view(2, 3).to(dtype)
        joined = torch.cat([constant, state_dict["q"][:2, :3].to(dtype)])
        return {"filled": torch.zeros(2, 3, dtype=dtype), "real": constant.T, "joined": joined}

    eager = converter(tensors())
    with DiskMap(file, state_dict_converter=converter) as lazy:
        again = pickle.loads(pickle.dumps(lazy))
    for name, expected in eager.items():
        assert_same(again[name], expected)


def test_results_are_independent_and_own_their_memory(file: str) -> None:
    with DiskMap(file, state_dict_converter=fused) as lazy:
        for name in lazy:
            first, second = lazy[name], lazy[name]
            first.fill_(9)
            assert_same(second, fused(tensors())[name])
            assert second.untyped_storage().nbytes() <= second.nbytes + 64


def test_threads_get_the_same(file: str) -> None:
    eager = fused(tensors())
    wrong: list[str] = []
    with DiskMap(file, state_dict_converter=fused) as lazy:

        def read_all() -> None:
            for _ in range(50):
                wrong.extend(name for name in lazy if not torch.equal(lazy[name], eager[name]))

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_prefetch_of_computed_names(file: str) -> None:
    with DiskMap(file, state_dict_converter=fused) as lazy:
        lazy.prefetch(lazy)


# ---------------------------------------------------------------------- together


def test_tied_names_share_memory_together_and_not_alone(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        return {"embed": state_dict["w"], "head": state_dict["w"], "copy": state_dict["w"].clone()}

    with DiskMap(file, state_dict_converter=converter) as lazy:
        got = lazy.tensors()
        got["embed"].add_(1)
        assert_same(got["head"], tensors()["w"] + 1)
        assert_same(got["copy"], tensors()["w"])
        alone = lazy["embed"].add_(1)
        assert_same(alone, lazy["head"] + 1)


def test_overlapping_views_share_memory_and_parts_do_not(file: str) -> None:
    def converter(state_dict: StateDict) -> StateDict:
        top, bottom = state_dict["w"].chunk(2)
        return {"top": top, "bottom": bottom, "q": state_dict["q"], "qT": state_dict["q"].T}

    with DiskMap(file, torch_dtype=torch.float64, state_dict_converter=converter) as lazy:
        got = lazy.tensors(["top", "bottom", "q", "qT"])
        assert got["top"].untyped_storage().nbytes() == got["top"].nbytes
        got["q"][1, 2] = 7
        assert got["qT"][2, 1] == 7


# ---------------------------------------------------------------------- other files


def test_nested_dicts_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    content = {"image_proj": {"w": torch.rand(2, 2)}, "ip": {"1.k": torch.rand(4, 2)}, "step": 3}
    torch.save(content, path)

    def converter(state_dict: StateDict) -> StateDict:
        inner = {"ip." + name: value.T for name, value in state_dict["ip"].items()}
        return {"image_proj": state_dict["image_proj"], "step": state_dict["step"], "nested": inner, **inner}

    with DiskMap(path, state_dict_converter=converter, converter_read_limit=0) as lazy:
        for opened in (lazy, pickle.loads(pickle.dumps(lazy))):
            assert_same(opened["image_proj"]["w"], content["image_proj"]["w"])  # type: ignore[index]
            assert opened["step"] == 3
            assert_same(opened["ip.1.k"], content["ip"]["1.k"].T)  # type: ignore[index]
            assert_same(opened["nested"]["ip.1.k"], content["ip"]["1.k"].T)  # type: ignore[index,call-overload]


def test_a_converter_may_return_an_inner_dict(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model_state": {"a": torch.rand(2, 3)}}, path)
    with DiskMap(path, state_dict_converter=lambda s: s["model_state"]) as lazy:
        assert list(lazy) == ["a"]
        assert lazy["a"].shape == (2, 3)


def test_names_tied_in_a_pickled_file_are_one_storage(tmp_path: Path) -> None:
    path = tmp_path / "tied.pth"
    weight = torch.rand(4, 3)
    torch.save({"embed": weight, "head": weight, "row": weight[1]}, path)

    def converter(state_dict: StateDict) -> StateDict:
        state_dict["head"].mul_(2)
        return state_dict

    with DiskMap(path, state_dict_converter=converter) as lazy:
        assert_same(lazy["embed"], weight * 2)
        assert_same(lazy["row"], weight[1] * 2)
    with DiskMap(path) as plain:
        got = plain.tensors()
        got["embed"].zero_()
        assert not got["row"].any()


@pytest.mark.filterwarnings("ignore:.*read as a whole")
def test_legacy_files(tmp_path: Path, save_legacy: Callable[..., str]) -> None:
    content = {"a": torch.rand(4, 3), "b": torch.rand(4, 3)}
    path = save_legacy(tmp_path / "old.pth", content)

    def converter(state_dict: StateDict) -> StateDict:
        return {"c": torch.cat([state_dict["a"], state_dict["b"].T.T]), "a": state_dict["a"]}

    with DiskMap(path, state_dict_converter=converter) as lazy:
        assert_same(lazy["c"], torch.cat([content["a"], content["b"]]))
        lazy["a"].zero_()
        assert_same(lazy["a"], content["a"])
