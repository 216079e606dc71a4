"""Sessions of this repository; ``nox -l`` lists them."""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2026.4"
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests", "integration"]

ROOT = Path(__file__).parent
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
PACKAGES = ["skipinit", "safemap", "offload-layers", "diffsynth-core-vram"]  # in order of dependence
PROJECTS = {p: nox.project.load_toml(ROOT / "packages" / p / "pyproject.toml")["project"] for p in PACKAGES}
DEVICES = [nox.param(d, id=d, tags=[d]) for d in ("cpu", "cuda")]
TESTED = [(p, d) for p in PACKAGES for d in ("cpu", "cuda")]
TESTED += [("offload-layers", "simulated")]
DIFFSYNTH = "diffsynth==2.1.12"  # the real DiffSynth-Studio; some of its dependencies have no CPU build
QUANTIZERS = ["bitsandbytes==0.50.2", "torchao==0.18.0"]  # those of its backends that compute on a CPU
NO_TEST_FOR_THIS_DEVICE = 5  # pytest's exit code when nothing was selected


def distribution_name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0]


def with_dependencies(package: str) -> list[str]:
    """*package* and the packages of this repository which it needs."""
    needed = {package}
    for requirement in PROJECTS[package]["dependencies"]:
        if distribution_name(requirement) in PACKAGES:
            needed.update(with_dependencies(distribution_name(requirement)))
    return [p for p in PACKAGES if p in needed]


def install(session: nox.Session, groups: Sequence[str], packages: Sequence[str], *more: str) -> None:
    """Install *packages* from this checkout, or only point at them where nothing may be installed."""
    if session.venv_backend == "none":
        session.env["PYTHONPATH"] = os.pathsep.join(str(ROOT / "packages" / p / "src") for p in packages)
        return
    requirements = [r for g in groups for r in nox.project.dependency_groups(GROUPS, g)]
    paths = [f"./packages/{p}" for p in packages]  # in one call, so that they satisfy each other
    session.install("--no-compile", "--constraint", "constraints.txt", *requirements, *paths, *more)


def python(session: nox.Session, *args: str, success_codes: Sequence[int] = (0,)) -> None:
    interpreter = sys.executable if session.venv_backend == "none" else "python"
    session.run(interpreter, *args, success_codes=success_codes)


def why_absent(session: nox.Session, device: str) -> str:
    """Say what *device* lacks here; nothing if tests can run on it."""
    if device == "simulated":
        session.env["TORCH_EXTENSIONS_DIR"] = str(ROOT / ".cache" / "torch_extensions")
        has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
        return "" if shutil.which("c++") and has_headers else "no C++ compiler here, or no headers of Python"
    if device == "cpu" or shutil.which("nvidia-smi"):
        return ""
    if os.environ.get("REQUIRE_CUDA") == "1":
        session.error("REQUIRE_CUDA=1, but this machine has no NVIDIA driver")
    return "no NVIDIA driver here (REQUIRE_CUDA=1 turns this into a failure)"


def check_device(session: nox.Session, device: str) -> None:
    if reason := why_absent(session, device):
        session.skip(reason)


@nox.session
@nox.parametrize("package,device", [nox.param(p, d, id=f"{p}, {d}", tags=[d]) for p, d in TESTED])
def tests(session: nox.Session, package: str, device: str) -> None:
    """Test one package on one device, with nothing installed that it does not declare."""
    check_device(session, device)
    install(session, ["test", *([device] if device == "simulated" else [])], with_dependencies(package))
    where = [f"packages/{package}/tests"]
    if session.venv_backend != "none" and device != "simulated":
        where.append(f"packages/{package}/README.md")
    codes = (0, NO_TEST_FOR_THIS_DEVICE) if device == "cuda" else (0,)
    python(session, "-m", "pytest", *where, f"--device={device}", *session.posargs, success_codes=codes)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def minimum(session: nox.Session, package: str) -> None:
    """Test one package with the lowest versions it declares (torch aside: constraints.txt)."""
    lowest = [
        requirement.replace(">=", "==")
        for p in with_dependencies(package)
        for requirement in PROJECTS[p]["dependencies"]
        if ">=" in requirement and distribution_name(requirement) not in ("torch", *PACKAGES)
    ]
    install(session, ["test"], with_dependencies(package), *lowest)
    python(session, "-m", "pytest", f"packages/{package}/tests", "--device=cpu", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Test the packages together, on real model classes and a real checkpoint, on each device there is."""
    install(session, ["integration", "simulated"], PACKAGES)
    for device in ("cuda", "simulated"):
        if reason := why_absent(session, device):
            session.log(f"not on {device}: {reason}")
            continue
        codes = (0, NO_TEST_FOR_THIS_DEVICE)
        python(
            session,
            "-m",
            "pytest",
            "integration-tests",
            f"--device={device}",
            *session.posargs,
            success_codes=codes,
        )
    where = ["integration-tests", "README.md", "docs"]  # the Python blocks of the pages are tests
    python(session, "-m", "pytest", *where, "--device=cpu", *session.posargs)


@nox.session
def diffsynth(session: nox.Session) -> None:
    """Test with the real DiffSynth-Studio; two dependencies without a CPU build have stand-ins."""
    install(session, ["integration", "studio"], PACKAGES)
    session.install("--no-deps", DIFFSYNTH, *QUANTIZERS)
    files = ["test_converters_diffsynth.py", "test_converters_layouts.py", "test_skipinit_real_models.py"]
    python(session, "-m", "pytest", *(f"integration-tests/{file}" for file in files), *session.posargs)
    python(session, "-m", "pytest", "integration-tests/studio", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run a real architecture plainly and offloaded to disk; compare time, memory and results."""
    install(session, ["demo"], PACKAGES)
    python(session, "demo", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(GROUPS, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the packages in strict mode."""
    install(session, ["types"], PACKAGES)
    session.run("mypy", *(a for p in PACKAGES for a in ("-p", p.replace("-", "_"))))


@nox.session
def docs(session: nox.Session) -> None:
    """Build docs/ into site/, warnings being errors."""
    install(session, ["docs"], PACKAGES)
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "site")


@nox.session
@nox.parametrize("device", DEVICES)
def bench(session: nox.Session, device: str) -> None:
    """Run the quick benchmarks; ``-- --benchmark-autosave`` keeps the figures."""
    check_device(session, device)
    install(session, ["test"], PACKAGES)
    where = [str(folder) for folder in sorted(ROOT.glob("packages/*/benchmarks"))]
    options = ["--benchmark-only", "--benchmark-group-by=group", f"--device={device}"]
    codes = (0, NO_TEST_FOR_THIS_DEVICE) if device == "cuda" else (0,)
    python(session, "-m", "pytest", *where, *options, *session.posargs, success_codes=codes)


PEER_BENCHMARKS = {
    "skipinit": "packages/skipinit/benchmarks/construction.py",
    "safemap": "packages/safemap/benchmarks/compare.py",
    "converters": "packages/safemap/benchmarks/converters.py",
    "sharded": "packages/safemap/benchmarks/sharded.py",
    "offload-layers": "packages/offload-layers/benchmarks/disk_offload.py",
    "diffsynth-core-vram": "packages/diffsynth-core-vram/benchmarks/studio.py",
}


@nox.session
@nox.parametrize("benchmark", list(PEER_BENCHMARKS), ids=list(PEER_BENCHMARKS))
def peers(session: nox.Session, benchmark: str) -> None:
    """Compare with other libraries in one run; the options of the script come after ``--``."""
    install(session, ["peers", "studio"], PACKAGES)
    session.install("--no-deps", DIFFSYNTH)
    python(session, PEER_BENCHMARKS[benchmark], *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run every test in one process and report what it covers."""
    install(session, ["integration"], PACKAGES)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "--device=cpu", *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels and sdists of all packages into dist/, and check them."""
    session.install(*nox.project.dependency_groups(GROUPS, "build"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("hatch", "build", "--all", "dist", env={"HATCH_DATA_DIR": str(session.create_tmp())})
    files = sorted(str(f) for f in Path("dist").iterdir())
    session.run("twine", "check", "--strict", *files)
    session.run("check-wheel-contents", *(f for f in files if f.endswith(".whl")))
