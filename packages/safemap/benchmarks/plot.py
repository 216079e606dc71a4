"""Draw the picture of the README from a result file: ``python plot.py RESULT.json PICTURE.png``."""

import json
import sys

import matplotlib.pyplot as plt

PEERS = {"safemap": "C0", "safemap read_into": "C9", "DiffSynth DiskMap": "C1", "safe_open + clone": "C2"}
FLOORS = {"floor: preadv": ":", "floor: memcpy": "--"}


def main(result_path: str, picture: str) -> None:
    with open(result_path) as file:
        result = json.load(file)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    rows = [row for row in result["jobs"]["one-tensor"] if row["bytes_per_s"]]
    for peer, style in [*((p, "o-") for p in PEERS), *FLOORS.items()]:
        points = sorted(
            (row["nbytes"] / 1e6, row["bytes_per_s"] / 1e9) for row in rows if row["peer"] == peer
        )
        if points:
            left.plot(
                *zip(*points, strict=True), style, label=peer, color=PEERS.get(peer, "0.5"), markersize=4
            )
    left.set(xscale="log", yscale="log", xlabel="size of the tensor, MB", ylabel="GB/s")
    left.set_title("One tensor, page cache warm")
    left.legend(fontsize=8)

    sweep = [row for row in result["jobs"]["sweep-warm"] if row["case"] == "warm, file order"]
    sweep = [row for row in sweep if row["peer"] != "safemap mmap=True"]  # gives views: it copies nothing
    sweep.sort(key=lambda row: row["bytes_per_s"])
    colors = ["0.7" if row["peer"].startswith("floor") else PEERS.get(row["peer"], "C7") for row in sweep]
    right.barh([row["peer"] for row in sweep], [row["bytes_per_s"] / 1e9 for row in sweep], color=colors)
    right.set(xlabel="GB/s")
    right.set_title(f"All tensors of a {sweep[0]['nbytes'] / 1e9:.1f} GB checkpoint, page cache warm")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
