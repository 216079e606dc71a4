"""Makes the pictures of reports.md: ``python docs/pictures.py``. What they show is measured when it runs."""

import tempfile
from pathlib import Path

import torch
from offload_layers import offload, recording, report, reset_counters
from safemap import DiskMap
from safetensors.torch import save_file
from torch import Tensor, nn

IMAGES = Path(__file__).parent / "images"
WIDTH, BLOCKS, TOKENS = 1024, 10, 32


class Block(nn.Module):
    """A transformer's block, with a gate of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(1, TOKENS, 3, 8, -1).transpose(1, 3).unbind(2)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.gate * self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def main() -> None:
    torch.manual_seed(0)
    model, x = Model().requires_grad_(False), torch.randn(1, TOKENS, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(model.state_dict(), path)
        with torch.no_grad(), DiskMap(path) as checkpoint:
            offload(model, device="cpu", ram="300MB", source=checkpoint)
            for _ in range(3):  # the order of the layers is learned, and who stays is decided
                model(x)
            reset_counters(model)
            with recording(model) as timeline:
                model(x)
            found = report(model)
    print(found)
    found.plot(IMAGES / "report.png")
    timeline.plot(IMAGES / "timeline.png")


if __name__ == "__main__":
    main()
