"""A script that knows nothing of this distribution, run as a user runs it; routing that comes too late."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from studio_cases import CASES

pytestmark = pytest.mark.slow

STAND_INS = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import stand_ins\n"

SCRIPT = """
import torch
from diffsynth.core import AutoWrappedLinear, AutoWrappedModule, DiskMap, load_model
from diffsynth.models.z_image_dit import RMSNorm, ZImageDiT

vram_config = {"computation_dtype": torch.bfloat16, "computation_device": "cpu"}
for role, where in (("offload", "disk"), ("onload", "disk"), ("preparing", "cpu")):
    vram_config[f"{role}_device"] = where
    vram_config[f"{role}_dtype"] = "disk" if where == "disk" else torch.bfloat16
module_map = {torch.nn.Linear: AutoWrappedLinear, RMSNorm: AutoWrappedModule}
model = load_model(ZImageDiT, "model.safetensors", CONFIG, module_map=module_map, vram_config=vram_config)
for module in model.modules():
    if hasattr(module, "onload"):
        module.onload()
found, _ = model.t_embedder.mlp[0].computation()
same = torch.equal(found, DiskMap("model.safetensors", device="cpu")["t_embedder.mlp.0.weight"])
print(same, AutoWrappedLinear.__module__.split(".")[0], __name__, sys.argv[1:])
"""


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    case = CASES["z-image"]
    save_file(case.build().state_dict(), tmp_path / "model.safetensors")
    script = STAND_INS + SCRIPT.replace("CONFIG", repr(dict(case.config)))
    (tmp_path / "script.py").write_text(script)
    return tmp_path


def test_a_script_runs_unchanged(folder: Path) -> None:
    alone = run(folder, "script.py", "--seed", "1")
    routed = run(folder, "-m", "diffsynth_core_vram", "script.py", "--seed", "1")
    assert alone.stdout.splitlines()[-1:] == ["True diffsynth __main__ ['--seed', '1']"], alone.stderr
    assert routed.stdout.splitlines()[-1:] == ["True offload_layers __main__ ['--seed', '1']"], routed.stderr


def test_routing_that_comes_too_late_is_refused(folder: Path) -> None:
    late = STAND_INS + "import diffsynth, diffsynth_core_vram; diffsynth_core_vram.install()"
    done = run(folder, "-c", late)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("RuntimeError: diffsynth is imported already, from ")
    assert message.endswith("with `python -m diffsynth_core_vram SCRIPT`.")


def test_routing_can_be_taken_back(folder: Path) -> None:
    code = STAND_INS + (
        "import diffsynth_core_vram as ours; ours.install(); ours.uninstall()\n"
        "import diffsynth.core as theirs\n"
        "print(theirs.AutoWrappedLinear is ours.AutoWrappedLinear, theirs.load_model is ours.load_model)"
    )
    assert run(folder, "-c", code).stdout.splitlines()[-1:] == ["False False"]
