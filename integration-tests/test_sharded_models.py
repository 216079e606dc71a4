"""Real model classes, built by skipinit, sharded by torch, filled by safemap; and the docs page's script.

A process of this file's own runs as ``python test_sharded_models.py WORLD FOLDER``: it forks the ranks.
"""

import os
import re
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safemap.distributed import load_sharded
from skipinit import skip_model_initialization
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

MODELS = ("qwen2", "sd3")  # ties and rotary tables; a persistent buffer
PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
SECONDS = 100

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked"),
]


def run_rank(rank: int, world: int, folder: Path) -> None:
    from conftest import CASES

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    mesh = init_device_mesh("cpu", (world,))
    for name in MODELS:
        case = CASES[name]
        plain = case.build()
        with skip_model_initialization():
            model = case.model_class(**case.config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(case.dtype)
        model.eval()
        layers = model.model.layers if name == "qwen2" else model.transformer_blocks
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        report = load_sharded(model, folder / f"{name}.safetensors", progress=False)
        assert report.missing_keys == report.unexpected_keys == []
        state = model.state_dict()
        for key, value in plain.state_dict().items():
            whole = state[key].full_tensor() if isinstance(state[key], DTensor) else state[key]
            assert torch.equal(whole, value), key
        assert torch.equal(case.call(model, torch.device("cpu")), case.call(plain, torch.device("cpu")))
        sharded = sum(parameter.nbytes for parameter in plain.parameters())
        buffers = sum(plain.state_dict()[key].nbytes for key, _ in plain.named_buffers() if key in state)
        assert sum(report.bytes_read) == sharded + world * buffers
    dist.barrier()
    dist.destroy_process_group()


def main(world: int, folder: Path) -> int:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run_rank(rank, world, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def run(command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_real_models(save, tmp_path: Path) -> None:
    from_cases = sys.modules[save.__module__].CASES
    for name in MODELS:
        save(from_cases[name].build(), tmp_path / f"{name}.safetensors")
    run([sys.executable, __file__, "2", str(tmp_path)])


def test_the_script_of_the_page(tmp_path: Path) -> None:
    found = re.search(r"<!-- sharded\.py -->.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    script = tmp_path / "sharded.py"
    script.write_text(found[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run([*launcher, str(script)])
    # weights of 4 * (64 * 64 + 64) + 10 * 64 + 10 numbers, of which each rank has half
    assert "bytes read by each rank: (34580, 34580)" in output


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
