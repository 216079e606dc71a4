"""The command ``safemap``: look into checkpoints, verify them, convert them."""

import argparse
import fnmatch
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from safemap._errors import SafemapError, UnsupportedTensorError
from safemap._examine import checksum, computable, count_not_finite, examine
from safemap._layout import TensorInfo
from safemap._map import DiskMap
from safemap._progress import progress
from safemap._write import write_safetensors

_log = logging.getLogger("safemap.cli")
_SHOWN_VALUES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a bad checkpoint, 2 for wrong usage."""
    options = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may hold what the terminal cannot show
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if options.command == "convert" else "default")
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end
        return 1
    except (SafemapError, OSError) as error:
        print(f"safemap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("safemap: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safemap", description="Look into checkpoints, and convert them.")
    commands = parser.add_subparsers(dest="command", required=True)
    checkpoint = "a file, a *.index.json, a folder or a pattern"

    ls = commands.add_parser("ls", help="list tensors: dtype, shape, bytes, name")
    ls.add_argument("path", nargs="+", help=checkpoint)
    ls.add_argument("--match", metavar="PATTERN", default="*", help="only names like PATTERN, as in *.weight")
    ls.add_argument("--json", action="store_true", help="one JSON object a line")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", help="show one tensor: where it lies, its range, its first values")
    show.add_argument("path", nargs="+", help=f"{checkpoint}, and then the NAME of the tensor")
    show.set_defaults(run=_show)

    verify = commands.add_parser("verify", help="check headers, and that every tensor can be read")
    verify.add_argument("path", nargs="+", help=checkpoint)
    verify.add_argument("--checksum", action="store_true", help="print the SHA-256 of every tensor")
    verify.add_argument("--nan", action="store_true", help="print how many values are NaN or infinite")
    verify.add_argument("--headers", action="store_true", help="headers only: read no tensor")
    verify.set_defaults(run=_verify)

    convert = commands.add_parser("convert", help="write a checkpoint as one safetensors file")
    convert.add_argument("path", nargs="+", help=f"{checkpoint}, and then the file to write")
    convert.add_argument("--dtype", type=_dtype, help="of floating-point tensors, for example bfloat16")
    convert.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    convert.add_argument("--tensors-only", action="store_true", help="leave out values that are no tensors")
    convert.set_defaults(run=_convert)
    return parser


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of torch")
    return dtype


def _open(paths: Sequence[str], **options: Any) -> DiskMap:
    return DiskMap(paths[0] if len(paths) == 1 else paths, **options)


def _split_last(options: argparse.Namespace, what: str) -> tuple[list[str], str]:
    if len(options.path) < 2:
        raise SafemapError(f"{options.command} needs a checkpoint and {what}")
    return options.path[:-1], options.path[-1]


def _infos(disk_map: DiskMap) -> Iterator[tuple[str, TensorInfo | None]]:
    """Every name with what is known of it; None for what is no tensor, or none that torch can hold."""
    for name in disk_map:
        try:
            yield name, disk_map.info(name)
        except (TypeError, UnsupportedTensorError):
            yield name, None


def _ls(options: argparse.Namespace) -> int:
    with _open(options.path) as disk_map:
        rows = [row for row in _infos(disk_map) if fnmatch.fnmatchcase(str(row[0]), options.match)]
        files = disk_map.files
    total = 0
    for name, info in rows:
        total += info.nbytes if info else 0
        if options.json:
            print(json.dumps({"name": name, **(_as_json(info) if info else {})}))
        elif info:
            kind = info.encoding or _short(info.dtype)
            print(f"{kind:<14} {list(info.shape)!s:<22} {info.nbytes:>15,}  {name}")
        else:
            print(f"{'(no tensor)':<53}  {name}")
    if not options.json:
        print(f"{len(rows):,} names, {total:,} bytes, {len(files):,} file{'s' * (len(files) != 1)}")
    return 0


def _as_json(info: TensorInfo) -> dict[str, object]:
    return {
        "dtype": _short(info.dtype),
        "shape": list(info.shape),
        "nbytes": info.nbytes,
        "file": info.file,
        "offset": info.offset,
        **({"encoding": info.encoding} if info.encoding else {}),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _show(options: argparse.Namespace) -> int:
    paths, name = _split_last(options, "the name of a tensor")
    with _open(paths) as disk_map:
        tensor = disk_map[name]
        if not isinstance(tensor, Tensor):
            print(f"{name}: {tensor!r}")
            return 0
        info = disk_map.info(name)
    print(f"name     {name}")
    print(f"dtype    {_short(info.dtype)}" + (f", stored as {info.encoding}" if info.encoding else ""))
    print(f"shape    {list(info.shape)}")
    print(f"bytes    {info.nbytes:,}")
    print(f"file     {info.file}" + ("" if info.offset is None else f" at byte {info.offset:,}"))
    facts = examine(tensor)
    if facts.mean is not None:
        print(f"range    {facts.low:.6g} to {facts.high:.6g}, mean {facts.mean:.6g}")
    print(f"NaN      {facts.nans:,}")
    print(f"Inf      {facts.infs:,}")
    found = computable(tensor)
    if found is not None:
        first = found.reshape(-1)[:_SHOWN_VALUES]
        values = first.to(torch.complex128 if first.is_complex() else torch.float64)
        print(f"values   {', '.join(f'{value:.6g}' for value in values.tolist())}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    with _open(options.path) as disk_map:
        infos = dict(_infos(disk_map))
        total = 0 if options.headers else sum(info.nbytes for info in infos.values() if info)
        bad = 0
        with progress("Verifying", total, enabled=not options.headers, log=_log) as advance:
            for name, info in infos.items():
                if options.headers or info is None:
                    continue
                tensor = disk_map[name]
                columns = [checksum(tensor)] if options.checksum else []
                if options.nan:
                    nans, infs = count_not_finite(tensor)
                    columns.append(f"{nans:>10,} NaN {infs:>10,} Inf")
                    bad += nans + infs > 0
                if columns:
                    print("  ".join([*columns, str(name)]))
                advance(info.nbytes)
        files = disk_map.files
    read = "headers read" if options.headers else f"{total:,} bytes read"
    found = f", {bad:,} with NaN or Inf" if options.nan else ""
    print(f"ok: {len(infos):,} names, {len(files):,} file{'s' * (len(files) != 1)}, {read}{found}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    paths, output = _split_last(options, "a file to write")
    if not output.endswith(".safetensors"):
        raise SafemapError(f"{output}: the output must end in .safetensors")
    folder = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(folder):
        raise SafemapError(f"{folder}: no such folder")
    if os.path.isdir(output):
        raise SafemapError(f"{output}: a folder, not a file to write")
    if os.path.exists(output) and not options.overwrite:
        raise SafemapError(f"{output}: exists; pass --overwrite to replace it")
    with _open(paths, unwrap=True) as disk_map:
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, info in _infos(disk_map):
            if info is None:
                if not options.tensors_only:
                    raise SafemapError(
                        f'"{name}" is no tensor that torch can hold; pass --tensors-only to leave such '
                        "values out"
                    )
                continue
            dtype = options.dtype if options.dtype and info.dtype.is_floating_point else info.dtype
            tensors[name] = dtype, tuple(info.shape)
        total = sum(disk_map.nbytes(name) for name in tensors)
        with progress("Converting", total, enabled=True, log=_log) as advance:

            def read(name: str) -> Tensor:
                advance(disk_map.nbytes(name))
                dtype, shape = tensors[name]
                if dtype == disk_map.info(name).dtype:
                    return disk_map[name]
                return disk_map.read_into(name, torch.empty(shape, dtype=dtype))

            metadata = {"format": "pt", **disk_map.metadata}
            write_safetensors(output, tensors, read, metadata)
    print(f"{output}: {len(tensors):,} tensors, {os.path.getsize(output):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
