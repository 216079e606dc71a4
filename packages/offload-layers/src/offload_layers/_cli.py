"""The command ``offload-layers``."""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from offload_layers._doctor import doctor
from offload_layers._errors import OffloadLayersError
from offload_layers._plan_command import add_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 if it could not be done, 2 for wrong usage."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        status: int = options.run(options)
        return status
    except (OffloadLayersError, OSError) as error:
        print("offload-layers:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("offload-layers: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offload-layers", description="Large models in little memory: what to expect of this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("doctor", help="measure this machine, and say what it lacks for full speed")
    command.add_argument("--device", type=_device, help="where models are to compute: cuda, cuda:1, cpu ...")
    command.add_argument("--file", metavar="CHECKPOINT", help="read pieces of this file, to measure its disk")
    command.add_argument("--json", action="store_true", help="one JSON object, with sizes in bytes")
    command.set_defaults(run=_run_doctor)
    add_plan(commands)
    return parser


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch") from error


def _run_doctor(options: argparse.Namespace) -> int:
    print(doctor(options.device, file=options.file, is_json=options.json))
    return 0
