"""``load_model`` while it reads: how much memory it takes, and the progress that it shows."""

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffsynth_core_vram import AutoWrappedLinear, load_model
from safetensors.torch import save_file
from torch import nn

FP8 = torch.float8_e4m3fn
IN_EIGHT_BITS = {f"{role}_dtype": FP8 for role in ("offload", "onload", "preparing")} | {
    "computation_dtype": torch.float32,
    "computation_device": "cpu",
}


class Counting(Mapping):
    """Gives a new tensor at each reading, and counts how many of them live at once."""

    def __init__(self, state):
        self.state = state
        self.alive = self.most = self.reads = 0

    def __getitem__(self, name):
        tensor = self.state[name].clone()
        self.reads += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone)
        return tensor

    def _gone(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)

    def __contains__(self, name):
        return name in self.state

    def info(self, name):
        return self.state[name]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))


def six_layers():
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))


def test_what_is_read_is_what_the_model_holds(layers):
    given = []

    class Source(Counting):
        def __getitem__(self, name):
            given.append(super().__getitem__(name))
            return given[-1]

    model = load_model(six_layers, "", torch_dtype=None, state_dict=Source(layers.state_dict()))
    assert {p.data_ptr() for p in model.parameters()} == {t.data_ptr() for t in given}
    assert len(given) == 6


@pytest.mark.parametrize("managed", [False, True], ids=["plain", "managed"])
def test_conversion_holds_one_tensor_twice(layers, managed):
    source = Counting(layers.state_dict())
    options = {"module_map": {nn.Linear: AutoWrappedLinear}, "vram_config": IN_EIGHT_BITS} if managed else {}
    model = load_model(six_layers, "", torch_dtype=torch.bfloat16, state_dict=source, **options)
    assert {p.dtype for p in model.parameters()} == {FP8 if managed else torch.bfloat16}
    assert source.reads == 6
    assert source.most == 1


def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted as Linux does")
def test_memory_for_reading_is_given_back(tmp_path):
    def one_layer():
        return nn.Sequential(nn.Linear(6144, 4096, bias=False))

    file = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.ones(4096, 6144)}, str(file))
    before = held()
    model = load_model(one_layer, file, module_map={nn.Linear: AutoWrappedLinear}, vram_config=IN_EIGHT_BITS)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights == 4096 * 6144  # in the file four times as much
    assert held() - before < 2 * weights


def test_progress_is_shown_on_a_terminal(layers, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_model(six_layers, "", state_dict=layers.state_dict())
    shown = capsys.readouterr().err
    assert "Loading Sequential: 100%" in shown
    assert "B/s" in shown


def test_no_progress_in_a_log_file(layers, capsys):
    load_model(six_layers, "", state_dict=layers.state_dict())
    assert capsys.readouterr() == ("", "")
