"""The demonstration runs on anybody's weights, and fails with one clear line where it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parent.parent / "demo"
MODEL = """
from torch import nn


class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return {"sample": self.linear(self.norm(x))}
"""
INPUTS = '{"x": {"shape": [3, 8], "dtype": "float32"}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model class and its checkpoint."""
    (tmp_path / "tiny_model.py").write_text(MODEL)
    torch.manual_seed(0)
    norm, linear = nn.BatchNorm1d(8), nn.Linear(8, 8)
    tensors = {f"norm.{n}": t for n, t in norm.state_dict().items()}
    tensors |= {f"linear.{n}": t for n, t in linear.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def demo(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        str(DEMO),
        "--cache",
        "cache",
        "--dtype",
        "float32",
        "--threads",
        "1",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


def test_own_weights(folder: Path) -> None:
    own = ["--checkpoint", "model.safetensors", "--model", "tiny_model:Tiny", "--config", '{"width": 8}']
    run = demo(folder, *own, "--inputs", INPUTS, "--picture", "memory.png")
    assert run.returncode == 0, run.stderr
    assert "The outputs are bit-identical (torch.float32 [3, 8])" in run.stdout
    for row in ("construction", "time to first output", "peak memory, anonymous", "bytes read"):
        assert row in run.stdout
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere", "--model", "tiny_model:Tiny"], "nowhere"),
        (["--checkpoint", "model.safetensors", "--model", "tiny_model:Huge"], "has no attribute 'Huge'"),
        (["--checkpoint", "model.safetensors"], "--checkpoint and --model go together"),
        (["--dtype", "float17"], "'float17' is no dtype of torch"),
    ],
)
def test_mistakes_get_one_clear_line(folder: Path, arguments: list[str], message: str) -> None:
    run = demo(folder, *arguments)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
