"""Plans: what is where, what it costs, what more memory would give; refusals with reasons."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offload_layers import ConfigError, Plan, Rates, Tier, offload, plan
from offload_layers._cli import main
from offload_layers._layer_sizes import LayerSize, Repeated
from offload_layers._plan import make_plan
from offload_layers._work import Work
from torch import nn

GB = 10**9
RATES = Rates(disk_bytes_per_s=2e9, bus_bytes_per_s=20e9, memory_bytes_per_s=500e9, flops=100e12)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def make(count: int = 40, nbytes: int = GB // 2, *, on_disk: bool = True, **settings: Any) -> Plan:
    sizes = [LayerSize(f"blocks.{i}", nbytes // 2, nbytes, nbytes, on_disk) for i in range(count)]
    given = {"device": CUDA, "vram": 8 * GB, "ram": 16 * GB, "rows": 4096, "rates": RATES} | settings
    return make_plan(sizes, **given)


def _with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def counts(planned: Plan) -> tuple[int, ...]:
    return tuple(sum(layer.tier is tier for layer in planned.layers) for tier in Tier)


def test_the_device_first_then_the_host_then_the_disk() -> None:
    assert counts(make(vram=40 * GB)) == (40, 0, 0)
    assert counts(make()) == (14, 26, 0)  # two of the largest pass
    assert counts(make(ram=4 * GB)) == (14, 6, 20)
    assert counts(make(vram=GB // 2, ram=GB)) == (0, 0, 40)


def test_on_a_cpu_there_is_one_memory() -> None:
    assert counts(make(device=CPU, ram=8 * GB)) == (14, 0, 26)
    with pytest.raises(ConfigError, match=r"20 GB of host memory are needed \(the weights of 40 layers"):
        make(device=CPU, on_disk=False)


def test_on_a_cpu_what_rests_there_takes_of_the_one_memory() -> None:
    def planned(ram: int, stored: int, on_disk: int) -> Plan:
        sizes = [LayerSize(str(i), GB // 2, GB, stored, is_on_disk=i < on_disk) for i in range(8)]
        return make_plan(sizes, device=CPU, vram=ram, ram=ram, rows=1, rates=None)

    for ram in range(6 * GB, 12 * GB, GB // 2):
        for stored, on_disk in ((GB, 4), (GB // 2, 0), (GB // 2, 3)):
            plan = planned(ram, stored, on_disk)
            assert plan.peak_device_nbytes <= ram
            assert plan.resting_nbytes + plan.limit_nbytes <= ram
    assert counts(planned(6 * GB, GB // 2, 0)) == (0, 8, 0)
    assert counts(planned(8 * GB, GB // 2, 0)) == (8, 0, 0)  # and none of them is stored as well
    assert counts(planned(8 * GB, 2 * GB, 0)) == (8, 0, 0)
    assert counts(planned(5 * GB, GB, 4)) == (4, 0, 4)
    with pytest.raises(ConfigError, match=r'"0" .* ram is 4 GB, of which 4 GB are .* Give at least 5 GB\.'):
        planned(4 * GB, GB // 2, 0)


def test_peaks() -> None:
    planned = make()
    assert planned.peak_device_nbytes == 14 * GB // 2 + 2 * GB // 2  # the limit cuts the third that passes
    assert planned.peak_device_nbytes <= planned.vram
    assert make(ram=4 * GB).peak_host_nbytes == 6 * GB // 2 + GB // 2 + (64 << 20)
    assert make(vram=40 * GB).peak_device_nbytes == 20 * GB


def test_layers_around_the_one_that_computes_are_on_the_device_with_it() -> None:
    sizes = [LayerSize(name, GB // 2, GB, GB) for name in ("", "blocks.1", "blocks.1.up", "blocks.10")]
    settings: dict[str, Any] = {"device": CUDA, "ram": 16 * GB, "rows": 1, "rates": None}
    planned = make_plan(sizes, vram=3 * GB, **settings)
    assert counts(planned) == (1, 3, 0)
    assert planned.peak_device_nbytes == 3 * GB
    with pytest.raises(ConfigError, match=r'"blocks\.1\.up" with the layers around it needs 3 GB on cuda:0 '):
        make_plan(sizes, vram=3 * GB - 1, **settings)
    assert counts(make_plan(sizes[1::2], vram=GB, **settings)) == (0, 2, 0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_layers_share_is_in_one_place_once(on_disk: bool) -> None:
    names: dict[str, tuple[Repeated, ...]] = {"embedding": (), "block": ()}
    names["head"] = (Repeated("embedding", GB, GB),)
    sizes = [LayerSize(name, GB // 2, GB, GB, on_disk, repeated) for name, repeated in names.items()]
    for device in (CPU, CUDA):
        planned = make_plan(sizes, device=device, vram=2 * GB, ram=3 * GB, rows=1, rates=None)
        assert counts(planned) == (3, 0, 0)
        assert planned.nbytes_on(Tier.DEVICE) == planned.peak_device_nbytes == 2 * GB
    on_host = make_plan(sizes, device=CUDA, vram=GB, ram=3 * GB, rows=1, rates=None)
    assert counts(on_host) == (0, 3, 0)
    assert on_host.nbytes_on(Tier.HOST) == on_host.peak_host_nbytes - (64 << 20) == 2 * GB
    assert on_host.moving_nbytes == 3 * GB  # it crosses for each of both


def test_layers_that_are_read_into_the_ring_make_it_grow() -> None:
    size = LayerSize("layer", 50 << 20, 100 << 20, 100 << 20)
    room = {"vram": 200 << 20, "ram": 1 << 30}
    planned = make_plan([size], device=CUDA, **room, rows=1, rates=None)
    assert planned.peak_host_nbytes == 64 << 20  # it stays on the device
    more = make_plan([size] * 9, device=CUDA, **room, rows=1, rates=None)
    assert more.nbytes_on(Tier.HOST) == 900 << 20  # no more than a gigabyte with the ring
    most = make_plan([size] * 40, device=CUDA, **room, rows=1, rates=None)
    assert most.nbytes_on(Tier.HOST) == 700 << 20
    assert most.peak_host_nbytes == (700 << 20) + 2 * (128 << 20)


def test_a_cpu_holds_one_layer_beside_those_that_stay_if_nothing_is_fetched_ahead() -> None:
    ahead, alone = (make(device=CPU, ram=8 * GB, fetches_ahead=ahead) for ahead in (True, False))
    assert counts(ahead) == counts(alone)
    assert ahead.peak_device_nbytes == 8 * GB  # the limit cuts the third that passes
    assert alone.peak_device_nbytes == alone.nbytes_on(Tier.DEVICE) + GB // 2 < 8 * GB
    assert alone.with_more(ram=GB).fetches_ahead is False


def test_whether_layers_are_fetched_ahead_is_known_from_the_source() -> None:
    class Asking(dict[str, Any]):
        def prefetch(self, names: Any) -> None: ...

    state = nn.Linear(8, 8).state_dict()
    for source, ahead in ((state, True), (Asking(state), False)):
        given = plan(nn.Linear(8, 8), device="cpu", ram="1GB", source=source, rates=RATES)
        assert given.fetches_ahead is ahead
        assert plan(source, device="cpu", ram="1GB", rates=RATES).fetches_ahead is ahead


def test_others_on_the_device_count() -> None:
    assert counts(make(foreign_nbytes=2 * GB)) == (10, 30, 0)
    with pytest.raises(ConfigError, match=r"of which 7\.8 GB are taken by others\. Give at least 8\.3 GB"):
        make(foreign_nbytes=int(7.8 * GB))


def test_seconds() -> None:
    everything = make(vram=40 * GB).predict()
    assert everything is not None
    assert everything.compute_s == pytest.approx(2 * 10e9 * 4096 / 100e12)
    assert everything.total_s == everything.compute_s
    moving = make(rows=1).predict()
    assert moving is not None
    assert moving.bus_s == pytest.approx(13 / 20)
    assert moving.total_s == moving.bus_s  # it hides the computation
    from_disk = make(rows=1, ram=4 * GB).predict()
    assert from_disk is not None
    assert from_disk.total_s == from_disk.disk_s == pytest.approx(10 / 2)
    assert make(rates=None).predict() is None


def test_on_a_cpu_reading_takes_the_cores_that_compute() -> None:
    rates = Rates(2e9, 20e9, 20e9, 1e9, disk_processor_s_per_byte=1e-9)
    sizes = [LayerSize(str(i), 1000, 4000, 4000) for i in range(10)]
    device = torch.device("cpu")
    planned = make_plan(sizes, device=device, vram=20_000, ram=20_000, rows=1, rates=rates)
    predicted, read = planned.predict(), planned.nbytes_on(Tier.DISK)
    assert predicted is not None
    assert read > 0
    assert predicted.total_s == pytest.approx(predicted.compute_s + read * 1e-9)
    elsewhere = dataclasses.replace(planned, device=torch.device("cuda")).predict()
    assert elsewhere is not None
    assert elsewhere.total_s == predicted.compute_s  # another processor's time


def test_on_a_cpu_the_disk_waits_for_what_is_copied() -> None:
    rates = Rates(1e6, 20e9, 20e9, 1e15, disk_processor_s_per_byte=1e-6)
    sizes = [LayerSize(str(i), 1000, 4000, 4000) for i in range(10)]
    planned = make_plan(sizes, device=torch.device("cpu"), vram=20_000, ram=20_000, rows=1, rates=rates)
    predicted, read = planned.predict(), planned.nbytes_on(Tier.DISK)
    assert predicted is not None
    assert read > 0
    assert predicted.total_s == pytest.approx(read / 1e6 + read * 1e-6)


def test_more_memory() -> None:
    planned = make(rows=1, ram=4 * GB)
    assert planned.with_more(ram=20 * GB).nbytes_on(Tier.DISK) == 0
    text = str(planned)
    assert "40 layers, 20 GB, computing on cuda:0 with 8 GB of its memory and 4 GB of the host's" in text
    assert "  disk       20 layers      10 GB" in text
    assert "  one forward of 1 rows: 5 s (computation 0.04 s, bus 0.65 s, disk 5 s)" in text
    assert "  vram +2 GB: 5 -> 4" in text
    assert "  ram +8 GB: 5 -> 1" in text
    assert "+" not in str(make(vram=40 * GB))


def test_on_a_cpu_more_is_more_of_the_one_memory() -> None:
    sizes = [LayerSize(str(i), GB // 2, GB, GB) for i in range(9)]
    slow = dataclasses.replace(RATES, disk_bytes_per_s=1e8)
    planned = make_plan(sizes, device=CPU, vram=4 * GB, ram=4 * GB, rows=1, rates=slow)
    assert planned.with_more(ram=8 * GB) == planned.with_more(vram=8 * GB)
    assert counts(planned.with_more(ram=8 * GB)) == (9, 0, 0)
    assert "  ram +8 GB: " in str(planned)
    assert "vram" not in str(planned)
    limited = make_plan(sizes, device=CPU, vram=4 * GB, ram=40 * GB, rows=1, rates=slow)
    assert "  vram +8 GB: " in str(limited)


def test_to_dict_is_json() -> None:
    told = json.loads(json.dumps(make().to_dict()))
    assert told["layers_on"] == {"device": 14, "host": 26, "disk": 0}
    assert told["layers"][0]["tier"] in ("device", "host")
    assert told["prediction"]["total_s"] > 0
    without_disk = dataclasses.replace(RATES, disk_bytes_per_s=math.inf)
    told = json.loads(json.dumps(make(rates=without_disk).to_dict(), allow_nan=False))
    assert told["rates"]["disk_bytes_per_s"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vram": 10**8},
            r'layer "blocks.0" needs 500 MB on cuda:0 .* vram is 100 MB\. Give at least 500 MB\.',
        ),
        (
            {"ram": 10**6},
            r"67.1 MB of host memory are needed \(67.1 MB for page-locked buffers\), but ram is 1 MB",
        ),
        ({"on_disk": False}, "Pass source=, so that weights may stay on disk, or give at least so much"),
        ({"count": 0}, "there is nothing to plan"),
    ],
    ids=["vram", "ram", "no source", "nothing"],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)


class TestOfCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for shard in range(2):
            header = {
                f"blocks.{10 * shard + i}.{name}": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
                for i in range(3)
                for name, shape in (("weight", [64, 32]), ("bias", [64]))
            }
            text = json.dumps(header).encode()
            path = tmp_path / f"model-{shard}.safetensors"
            path.write_bytes(len(text).to_bytes(8, "little") + text)
        return tmp_path

    def test_only_headers_are_read(self, folder: Path) -> None:
        planned = plan(folder, device="cpu", ram="1GB", rates=RATES)
        assert [layer.size.name for layer in planned.layers] == [f"blocks.{i}" for i in (0, 1, 2, 10, 11, 12)]
        assert planned.layers[0].size == LayerSize("blocks.0", 64 * 32 + 64, 4224, 4224)
        files = sorted(folder.iterdir())
        again = plan(files, device="cpu", ram="1GB", rates=RATES, dtype=torch.float32)
        assert again.layers[0].size.nbytes == 2 * 4224

    @pytest.mark.parametrize("dtype", [None, torch.float32])
    def test_the_machine_is_measured_in_the_dtype_and_with_the_rows_of_the_model(
        self, folder: Path, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probed: list[dict[str, Any]] = []
        monkeypatch.setattr(
            "offload_layers._offload.probe", lambda *_, **given: probed.append(given) or RATES
        )
        plan(folder, device="cpu", ram="1GB", dtype=dtype, rows=77)
        model = nn.Linear(8, 8).to(dtype or torch.bfloat16)
        plan(model, device="cpu", ram="1GB", rows=77)
        for given in probed:
            assert (given["dtype"], given["rows"]) == (dtype or torch.bfloat16, 77)

    def test_the_command(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probed: list[object] = []
        monkeypatch.setattr(
            "offload_layers._offload.probe", lambda *a, **k: probed.append(k["file"]) or RATES
        )
        arguments = ["plan", str(folder), "--device", "cpu", "--ram", "20kB", "--rows", "8"]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith("6 layers, 25.3 kB, computing on cpu with 20 kB of its memory\n")
        assert probed == [str(folder / "model-0.safetensors")]
        assert main([*arguments, "--json", "--dtype", "float32"]) == 0
        assert json.loads(capsys.readouterr().out)["layers"][0]["nbytes"] == 2 * 4224
        assert main(["plan", str(folder / "none"), "--device", "cpu"]) == 1
        assert capsys.readouterr().err.startswith("offload-layers: ")
        assert main([*arguments, "--dtype", "bf17"]) == 1
        assert "--dtype bf17 is no dtype of torch" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0" * 8,
            b"\xff" * 16,
            (5).to_bytes(8, "little") + b"{nope",
            (2).to_bytes(8, "little") + b"[]",
            *map(
                _with_header,
                (
                    b'{"a": {"dtype": "F32", "shape": [1e400]}}',
                    b'{"a": {"dtype": "F32", "shape": [2.5]}}',
                    b'{"a": {"dtype": "F32", "shape": [-1]}}',
                    b'{"a": {"dtype": "F32", "shape": "12"}}',
                    b'{"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}",
                ),
            ),
        ],
    )
    def test_no_checkpoint(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.safetensors: no safetensors file"):
            plan(path, device="cpu", ram="1GB", rates=RATES)

    def test_a_dtype_that_is_no_name(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(_with_header(b'{"a": {"dtype": ["F32"], "shape": [1]}}'))
        with pytest.raises(ConfigError, match='tensor "a" has the unknown dtype'):
            plan(path, device="cpu", ram="1GB", rates=RATES)

    def test_names_with_digits_that_are_no_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        names = ("b.10.w", "b.2.w", "b.\u00b2.w")
        header = json.dumps({name: {"dtype": "F32", "shape": [1]} for name in names})
        path.write_bytes(_with_header(header.encode()))
        planned = plan(path, device="cpu", ram="1GB", rates=RATES)
        assert [layer.size.name for layer in planned.layers] == ["b.2", "b.10", "b.\u00b2"]

    def test_bad_paths(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            plan(tmp_path / "missing", device="cpu", ram="1GB", rates=RATES)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=r"no \*\.safetensors file in this folder"):
            plan(tmp_path / "empty", device="cpu", ram="1GB", rates=RATES)
        with pytest.raises(ConfigError, match=r'tensor "blocks\.0\.weight" is in another of the files too'):
            plan([folder, folder / "model-0.safetensors"], device="cpu", ram="1GB", rates=RATES)


def test_of_a_model_and_of_a_mapping() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    of_model = plan(model, device="cpu", ram="1MB", rates=RATES)
    of_mapping = plan(dict(model.state_dict()), device="cpu", ram="1MB", rates=RATES)
    assert (
        [x.size.nbytes for x in of_model.layers] == [x.size.nbytes for x in of_mapping.layers] == [288, 144]
    )
    assert not any(x.size.is_on_disk for x in of_model.layers)


def test_a_mapping_whose_shapes_are_tuples() -> None:
    class Lazy(dict[str, object]):
        def info(self, name: str) -> object:
            return SimpleNamespace(dtype=torch.float16, shape=(8, 4))

    planned = plan(Lazy({"a.weight": None}), device="cpu", ram="1MB", rates=RATES)  # type: ignore[arg-type]
    assert planned.layers[0].size == LayerSize("a", 32, 64, 64)


def test_a_map_of_weights_need_not_be_a_mapping() -> None:
    class Older:
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            self._tensors = tensors

        def __getitem__(self, name: str) -> torch.Tensor:
            return self._tensors[name]

        def __contains__(self, name: object) -> bool:
            return name in self._tensors

        def __iter__(self) -> Iterator[str]:
            return iter(self._tensors)

    source: Any = Older({"a.weight": torch.zeros(8, 4)})
    assert plan(source, device="cpu", ram="1MB", rates=RATES).layers[0].size.name == "a"


def test_tied_parameters_may_be_in_the_source_under_one_name() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "second": nn.Linear(4, 4, bias=False)})
    model.to("meta")
    model["second"].weight = model["first"].weight
    planned = plan(model, device="cpu", ram="1MB", source={"first.weight": torch.zeros(4, 4)}, rates=RATES)
    assert [(x.size.name, x.size.is_on_disk) for x in planned.layers] == [("first", True), ("second", True)]


@pytest.mark.parametrize(
    "what", [None, 5, b"a.safetensors", nn.Linear, [], iter([]), [1, "a"], object(), dict]
)
def test_what_cannot_be_planned(what: Any) -> None:
    with pytest.raises(ConfigError, match=r"what is planned must be a torch\.nn\.Module, a mapping of names"):
        plan(what, device="cpu", ram="1MB", rates=RATES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows must be a whole number, 1 or more; got 0"),
        ({"rows": -5}, "rows must be a whole number, 1 or more; got -5"),
        ({"rows": math.nan}, "rows must be a whole number, 1 or more; got nan"),
        ({"rows": "8"}, "rows must be a whole number, 1 or more; got '8'"),
        ({"dtype": torch.int8}, r"dtype must be a floating-point dtype, .* got torch\.int8"),
        ({"storage_dtype": torch.bool}, r"storage_dtype must be a floating-point dtype, .* got torch\.bool"),
        ({"device": "vulkan"}, "torch cannot compute on device 'vulkan' here; choose cpu or cuda"),
        ({"source": "model.safetensors"}, "source must map names to tensors; got str"),
        ({"source": [torch.zeros(1)]}, "source must map names to tensors; got list"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    given = {"device": "cpu", "ram": "1MB", "rates": RATES} | arguments
    for function in (plan, offload):
        with pytest.raises(ConfigError, match=message):
            function(nn.Linear(8, 8), **given)


def test_the_picture_of_a_forward_on_inputs_does_not_name_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    titles: list[str] = []
    monkeypatch.setattr(axes, "set_title", lambda self, title, **_: titles.append(title))
    make(work=Work({}, 0.5, 0)).plot(tmp_path / "plan.png")
    make().plot(tmp_path / "plan.png")
    assert titles[0].endswith("0.65 s a forward on these inputs")
    assert titles[1].endswith("a forward of 4,096 rows")


def test_a_picture_of_an_unknown_format(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"plan\.xyz: no picture is called \.xyz; known are .*png"):
        make().plot(tmp_path / "plan.xyz")


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make(ram=4 * GB).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.img_mod.1",
        "blocks.3.adaLN_modulation.1",
        "single_transformer_blocks.7.norm.linear",
        "time_text_embed.timestep_embedder.linear_1",
        "time_embedding.0",
        "modulation",
    ],
)
def test_modulations_are_computed_for_one_row(name: str) -> None:
    size = LayerSize(name, 10, 20, 20)
    assert size.is_computed_once
    assert size.work(4096) == 10


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up", "norm.weight", "blocks.0.attn.to_q", "sometimes.x", ""]
)
def test_other_layers_are_computed_for_all(name: str) -> None:
    assert LayerSize(name, 10, 20, 20).work(4096) == 40960
