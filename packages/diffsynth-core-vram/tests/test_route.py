"""``install`` and ``python -m diffsynth_core_vram``: a real DiffSynth-Studio on this implementation."""

import pytest

pytestmark = pytest.mark.slow

WHERE = """
    import diffsynth.core.vram.layers as layers
    from diffsynth.core import AutoWrappedLinear, DiskMap, load_model
    from diffsynth.core.loader.model import enable_vram_management
    ours = ["diffsynth_core_vram" in layers.__file__]
    import diffsynth_core_vram.core.vram as vram
    ours += [AutoWrappedLinear is vram.AutoWrappedLinear, DiskMap is vram.DiskMap]
    ours += [enable_vram_management is vram.enable_vram_management]
    print(ours, load_model())
"""


@pytest.fixture
def both(environment, wheels):
    """An environment that has this distribution and a stand-in for DiffSynth-Studio."""
    environment.unpack(wheels.ours)
    environment.unpack(wheels.real)
    return environment


def after(preparation, code=WHERE):
    return f"    import diffsynth_core_vram\n    {preparation}\n{code}"


def test_without_install_the_real_one_keeps_its_own(both):
    assert both.run(WHERE) == "[False, False, False, False] real"


def test_install_serves_the_real_one(both):
    assert both.run(after("diffsynth_core_vram.install()")) == "[True, True, True, True] real"


def test_install_twice_is_install_once(both):
    twice = "diffsynth_core_vram.install(); diffsynth_core_vram.install()"
    assert both.run(after(f"{twice}; diffsynth_core_vram.uninstall()")) == "[False, False, False, False] real"


def test_uninstall_without_install_does_nothing(both):
    assert both.run(after("diffsynth_core_vram.uninstall()")) == "[False, False, False, False] real"


def test_install_too_late_is_an_error(both):
    done = both.start("-c", "import diffsynth, diffsynth_core_vram; diffsynth_core_vram.install()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: diffsynth is imported already, from {both.site_packages / 'diffsynth/__init__.py'}, "
        "with its own diffsynth.core.vram. Call diffsynth_core_vram.install() before the first `import "
        "diffsynth`, or start the program with `python -m diffsynth_core_vram SCRIPT`."
    )


def test_install_again_while_ours_is_imported(both):
    code = """
        import diffsynth_core_vram
        diffsynth_core_vram.install()
        import diffsynth
        diffsynth_core_vram.uninstall()
        diffsynth_core_vram.install()
    """
    assert both.run(code) == ""


def test_install_where_the_real_one_is_absent(environment, wheels):
    environment.unpack(wheels.ours)
    code = """
        import diffsynth, diffsynth_core_vram
        diffsynth_core_vram.install()
        from diffsynth.core.vram.layers import AutoWrappedLinear
        print(AutoWrappedLinear is diffsynth.AutoWrappedLinear)
    """
    assert environment.run(code) == "True"


def test_script_runs_as_if_python_had_started_it(both, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "helper.py").write_text("HELP = 'found'")
    (folder / "script.py").write_text(
        "import sys, helper\n"
        "from diffsynth.core.vram import layers\n"
        "print(__name__, sys.argv, helper.HELP, sys.path[0], 'diffsynth_core_vram' in layers.__file__)\n"
        "raise SystemExit(7)"
    )
    script = str(folder / "script.py")
    done = both.start("-m", "diffsynth_core_vram", script, "--seed", "1")
    assert done.stdout.strip() == f"__main__ {[script, '--seed', '1']} found {folder} True"
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "the following arguments are required: SCRIPT"),
        (["--sript"], "the following arguments are required: SCRIPT"),
        (["absent.py"], "no such file: 'absent.py', from the folder "),
    ],
    ids=["nothing", "an option", "a missing file"],
)
def test_command_line_says_what_is_wrong(both, arguments, problem):
    done = both.start("-m", "diffsynth_core_vram", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m diffsynth_core_vram ")
    assert problem in done.stderr
