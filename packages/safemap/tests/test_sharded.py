"""``safemap.distributed`` on 2, 3 and 4 processes, which run the cases of ``sharded_cases.py``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

if not distributed.is_available() or not hasattr(os, "fork"):
    pytest.skip("needs torch.distributed, and processes that fork", allow_module_level=True)

HERE = Path(__file__).parent
EVERYWHERE = [
    "fsdp",
    "each_byte_once",
    "every_placement",
    "pages_of_columns",
    "renamed",
    "names",
    "missing_on_one_rank",
    "truncated_on_one_rank",
    "different_on_one_rank",
]
ON_TWO = ["memory", "after_a_forward", "policies", "dtypes", "tensor_parallel", "shapes_differ"]
ON_FOUR = ["every_pair_of_placements", "hybrid", "tensor_parallel", "both_along_one_dimension"]
AT_LAST = ["killed_while_loading"]
CASES = {
    2: EVERYWHERE + ON_TWO + AT_LAST,
    3: [*EVERYWHERE, "part_of_the_ranks", *AT_LAST],
    4: EVERYWHERE + ON_FOUR + AT_LAST,
}
COMPUTING = ["fsdp", "after_a_forward", "policies", "hybrid", "both_along_one_dimension"]
SECONDS = 120  # after which a hanging rank is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save) -> Path:
    """The checkpoints of the cases."""
    from torch.distributed import fsdp

    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    sys.path.insert(0, str(HERE))
    try:
        from sharded_cases import plain_net, saved
    finally:
        sys.path.remove(str(HERE))
    folder: Path = tmp_path_factory.mktemp("sharded")
    state = saved(plain_net())
    save(folder / "net.safetensors", state)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    save(folder / "half.safetensors", half)
    odd = {f"model.{name}": value for name, value in state.items()}
    for number in range(2):
        up, down = (f"model.blocks.{number}.{layer}.weight" for layer in ("up", "down"))
        whole = odd.pop(up)
        odd[f"{up}.a"], odd[f"{up}.b"] = whole[:19].contiguous(), whole[19:].contiguous()
        odd[f"{down}.t"] = odd.pop(down).T.contiguous()
    save(folder / "odd.safetensors", odd)
    names = {name: value for name, value in state.items() if name != "blocks.1.gate"}
    save(folder / "names.safetensors", names | {"other": torch.ones(3)})
    save(folder / "shape.safetensors", state | {"blocks.0.gate": torch.ones(1, 17)})
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    linears = {"0.weight": noise(33, 7), "0.bias": noise(33), "1.weight": noise(5, 33)}
    save(folder / "linears.safetensors", linears)
    save(folder / "linears-half.safetensors", {name: value.half() for name, value in linears.items()})
    shapes = {"even": (8, 12, 4), "uneven": (5, 7, 9), "small": (1, 3, 2), "long": (3, 5, 3000)}
    save(folder / "shapes.safetensors", {name: noise(*shape) for name, shape in shapes.items()})
    save(folder / "wide.safetensors", {"wide": noise(6, 4 * 3 * 1024)})
    # halves of 4 MiB and 4 KiB, and one of 2 KiB less
    large = {f"{number}.weight": torch.ones(4099, 1024, dtype=torch.bfloat16) for number in range(6)}
    save(folder / "large.safetensors", large)
    return folder


@pytest.fixture(scope="module")
def told(folder: Path):
    """What the ranks of each world told; a world is run once, for all of its cases."""
    worlds: dict[int, str] = {}

    def run(world: int, case: str) -> dict[int, str]:
        if world not in worlds:
            worlds[world] = _run(world, folder, CASES[world])
        files = {rank: folder / f"{case}.{world}.{rank}" for rank in range(world)}
        return {r: f.read_text() if f.exists() else f"ended early\n{worlds[world]}" for r, f in files.items()}

    return run


def _run(world: int, folder: Path, cases: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = str(HERE / "sharded_cases.py")
    with (folder / f"output-{world}").open("w+") as output:
        launcher = subprocess.Popen(
            [sys.executable, script, str(world), str(folder), *cases],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            launcher.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)  # the files tell which case it was
            launcher.wait()
        output.seek(0)
        return output.read()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in CASES for case in CASES[world]])
def test_ranks(world: int, case: str, told) -> None:
    if case in COMPUTING and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard computes on accelerators only in this torch")
    for rank, text in told(world, case).items():
        assert text == "ok", f"rank {rank} of {world}: {text}"


def test_importing_safemap_leaves_torch_distributed_alone() -> None:
    """A torch without it, and start-up time, are none of this package's business until it is asked for."""
    code = (
        "import sys, torch; before = set(sys.modules); import safemap; "
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('torch.distributed')))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
