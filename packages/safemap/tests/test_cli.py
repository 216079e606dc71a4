"""The command line, called as a function and once as a program."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safemap import DiskMap
from safemap._cli import main
from safemap._dtypes import TORCH_DTYPES
from safemap.testing import assert_same, safetensors_bytes
from torch import Tensor


def test_ls(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", path, "--match", "blocks.*"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "float32        [64, 32]                         8,192  blocks.0.weight",
        "bfloat16       [64]                               128  blocks.0.bias",
        "float16        [700, 600]                     840,000  blocks.1.large",
        "3 names, 848,320 bytes, 1 file",
    ]


def test_ls_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", path, "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    info = DiskMap(path).info("embedding")
    assert rows["embedding"] == {
        **{"name": "embedding", "dtype": "bfloat16", "shape": [1200, 1000], "nbytes": 2_400_000},
        **{"file": path, "offset": info.offset},
    }


def test_show(tmp_path: Path, save, capsys: pytest.CaptureFixture[str]) -> None:
    tensor = torch.tensor([1.0, -2.0, float("nan"), float("inf"), 4.0])
    path = save(tmp_path / "m.safetensors", {"t": tensor})
    assert main(["show", path, "t"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name     t",
        "dtype    float32",
        "shape    [5]",
        "bytes    20",
        f"file     {path} at byte {DiskMap(path).info('t').offset:,}",
        "range    -2 to 4, mean 1",
        "NaN      1",
        "Inf      1",
        "values   1, -2, nan, inf, 4",
    ]


def test_show_every_kind(path: str, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    for name in tensors:
        assert main(["show", path, name]) == 0
    assert "values   " in capsys.readouterr().out


def test_verify(path: str, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", path, "--checksum", "--nan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    digest = hashlib.sha256(tensors["embedding"].view(torch.int16).numpy().tobytes()).hexdigest()
    assert f"{digest}           0 NaN          0 Inf  embedding" in lines
    assert lines[-1] == "ok: 11 names, 1 file, 3,248,733 bytes read, 0 with NaN or Inf"
    assert main(["verify", path, "--headers"]) == 0
    assert capsys.readouterr().out.splitlines() == ["ok: 11 names, 1 file, headers read"]


def test_verify_of_a_broken_file(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(path, os.path.getsize(path) - 1)
    assert main(["verify", path]) == 1
    assert capsys.readouterr().err.startswith(f"safemap: {path}: ")


@pytest.mark.parametrize("source", ["pth", "legacy", "shards"])
def test_convert(source: str, tmp_path: Path, save, save_legacy, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "a": torch.randn(300, 200),
        "b.t": torch.randn(4, 6).t(),
        "c": torch.arange(5),
        "d": torch.tensor(1),
    }
    if source == "shards":
        paths = [save(tmp_path / f"{n}.safetensors", {n: t.contiguous()}) for n, t in content.items()]
    elif source == "pth":
        torch.save({"state_dict": content}, tmp_path / "m.pth")
        paths = [str(tmp_path / "m.pth")]
    else:
        paths = [save_legacy(tmp_path / "m.bin", content)]
    output = str(tmp_path / "out.safetensors")
    assert main(["convert", *paths, output]) == 0
    converted = DiskMap(output)
    assert set(converted) == set(content)
    for name, tensor in content.items():
        assert_same(converted[name], tensor)
    assert converted.metadata["format"] == "pt"
    assert f"{output}: 4 tensors" in capsys.readouterr().out


def test_converted_files_suit_the_library(
    path: str, tmp_path: Path, tensors: dict[str, Tensor], library_knows
) -> None:
    from safetensors import safe_open

    output = str(tmp_path / "out.safetensors")
    assert main(["convert", path, output, "--dtype", "float64"]) == 0
    if not library_knows(Path(output).read_bytes()):
        pytest.skip("the safetensors library does not know all of these dtypes")
    with safe_open(output, framework="pt") as reference:
        assert set(reference.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert_same(reference.get_tensor(name), tensor.double() if tensor.is_floating_point() else tensor)


def test_convert_replaces_nothing_unasked_and_leaves_no_rests(path: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    assert main(["convert", path, str(output)]) == 1
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"

    torch.save({"a": torch.ones(2), "c": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m.pth")
    assert main(["convert", str(tmp_path / "m.pth"), str(output), "--overwrite"]) == 1
    assert "complex128, which safetensors files cannot hold" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    for place, message in (("no/m.safetensors", "no: no such folder"), ("", ": a folder, not a file")):
        folder = tmp_path / "x.safetensors"
        folder.mkdir(exist_ok=True)
        assert main(["convert", path, str(folder / place), "--overwrite"]) == 1
        assert message in capsys.readouterr().err
        folder.rmdir()
    assert sorted(os.listdir(tmp_path)) == ["m.pth", "model.safetensors", "out.safetensors"]
    assert main(["convert", path, str(output), "--overwrite"]) == 0
    assert len(DiskMap(output)) == 11


def test_convert_of_what_is_no_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "m.pth")
    output = str(tmp_path / "out.safetensors")
    assert main(["convert", str(tmp_path / "m.pth"), output]) == 1
    assert '"step" is no tensor that torch can hold; pass --tensors-only' in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "m.pth"), output, "--tensors-only"]) == 0
    assert list(DiskMap(output)) == ["a"]


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = str(tmp_path / "m.pth"), str(tmp_path / "out.safetensors")
    torch.save({0: torch.ones(2), "a\ud800": torch.ones(2)}, path)
    assert main(["ls", path]) == main(["verify", path, "--checksum"]) == 0
    assert "  a\\ud800\n" in capsys.readouterr().out
    for name in (0, "a\ud800", "__metadata__"):  # the last would take the place of the metadata
        torch.save({"b": torch.ones(2), name: torch.ones(2)}, path)
        assert main(["convert", path, output]) == 1
        assert f"{name!r} cannot be the name of a tensor in a safetensors file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m.pth"]


def test_values_that_torch_cannot_compute_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtype = TORCH_DTYPES.get("F4")
    if dtype is None:
        pytest.skip("this torch has no F4")
    header = {"t": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    path = str(tmp_path / "m.safetensors")
    assert main(["show", path, "t"]) == main(["verify", path, "--nan", "--checksum"]) == 0
    out = capsys.readouterr().out
    assert "NaN      0\n" in out
    assert "\nvalues" not in out


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(path: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "safemap", "ls", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_wrong_usage(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", path]) == 1
    assert capsys.readouterr().err == "safemap: show needs a checkpoint and the name of a tensor\n"
    assert main(["convert", path, "out.bin"]) == 1
    assert "the output must end in .safetensors" in capsys.readouterr().err
    assert main(["show", path, "nothing"]) == 1
    assert 'no tensor "nothing"' in capsys.readouterr().err
    for usage in ([], ["frobnicate"], ["convert", path, "x", "--dtype", "int77"]):
        with pytest.raises(SystemExit) as exit_status:
            main(usage)
        assert exit_status.value.code == 2


@pytest.mark.slow
def test_as_a_program(path: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "safemap", "ls", path], capture_output=True, text=True, check=True
    )
    assert run.stdout.endswith("11 names, 3,248,733 bytes, 1 file\n")
