"""The script that measures an accelerator runs to its end without one, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[1] / "packages" / "offload-layers" / "benchmarks" / "gpu.py"


def test_the_accelerator_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    tiny = ["--device", "cpu", "--layers", "2", "--heads", "1", "--tokens", "16", "--output", str(out)]
    run = subprocess.run([sys.executable, str(GPU), *tiny], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["subject"]: row for row in json.loads(out.read_text())["rows"]}
    ours = [row for name, row in rows.items() if name.startswith("offload-layers")]
    assert len(ours) == 8
    assert all(row["identical"] for row in ours)  # what fits a device is not kept in eight bits
    assert rows["plain, resident"]["over_floor"] == 1.0
