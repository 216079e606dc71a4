"""``install`` and ``python -m diffsynth_core_vram``: a real DiffSynth-Studio on this implementation."""

import textwrap

import pytest

pytestmark = pytest.mark.slow

WHERE = """
    import diffsynth.core.vram.layers as layers
    from diffsynth.core import AutoWrappedLinear, DiskMap, load_model, load_state_dict
    from diffsynth.core.loader.model import enable_vram_management
    from diffsynth.models import model_loader
    import diffsynth_core_vram
    ours = ["diffsynth_core_vram" in layers.__file__]
    import diffsynth_core_vram.core.vram as vram
    ours += [AutoWrappedLinear is vram.AutoWrappedLinear, DiskMap is vram.DiskMap]
    ours += [enable_vram_management is vram.enable_vram_management]
    ours += [getattr(load_model, "__wrapped__", None) is diffsynth_core_vram.load_model]
    ours += [model_loader.load_model is load_model, load_state_dict is diffsynth_core_vram.load_state_dict]
    print("ours" if all(ours) else "theirs" if sum(ours) == 1 else ours)
"""


@pytest.fixture
def both(environment, wheels):
    """An environment that has this distribution and a stand-in for DiffSynth-Studio."""
    environment.unpack(wheels.ours)
    environment.unpack(wheels.real)
    return environment


def after(preparation, code=WHERE):
    return f"import diffsynth_core_vram\n{preparation}\n{textwrap.dedent(code)}"


def test_without_install_the_real_one_keeps_its_own(both):
    assert both.run(WHERE) == "theirs"


def test_install_serves_the_real_one(both):
    assert both.run(after("diffsynth_core_vram.install()")) == "ours"


def test_install_twice_is_install_once(both):
    twice = "diffsynth_core_vram.install(); diffsynth_core_vram.install()"
    assert both.run(after(f"{twice}; diffsynth_core_vram.uninstall()")) == "theirs"


def test_deepspeed_builds_its_own_models(both):
    both.variables["ZERO3"] = "1"
    code = "    from diffsynth.core import load_model; print(load_model())"
    assert both.run(after("diffsynth_core_vram.install()", code)) == "real"


def test_pickled_checkpoints_are_recognised_without_reading_them(both):
    code = "    from diffsynth.core.loader import file; print(file.load_keys_dict_from_bin('a.bin'))"
    assert both.run(after("", code)) == "real"
    assert both.run(after("diffsynth_core_vram.install()", code)) == "['keys', ['a.bin', 'meta']]"


def test_a_module_map_may_name_a_class_that_is_gone(both):
    code = """
        from diffsynth.models.model_loader import ModelPool
        for model in ("Mapped", "Versioned", "Other"):
            print(ModelPool().fetch_module_map(f"models.{model}", {"offload_dtype": "disk"}))
        print(ModelPool().fetch_module_map("models.Mapped", {"offload_dtype": None}))
    """
    assert both.run(after("", code)).split() == ["real"] * 4
    done = both.start("-c", after("diffsynth_core_vram.install()", code))
    *maps, none = done.stdout.splitlines()
    assert maps[:2] == ["{'layers.Linear': 'ours.Linear'}", "{'layers.New': 'ours.Module'}"]
    assert maps[2].startswith("{'models.Other': ")
    assert none == "None"
    assert "the module map of models.Mapped names layers.Gone: no attribute 'Gone'" in done.stderr


MODELS = """
    from unittest.mock import MagicMock
    from diffsynth.diffusion.base_pipeline import BasePipeline

    class Model:
        vram_management_enabled = True
        def __init__(self, name, **methods): self.name = name; self.__dict__.update(methods)
        def modules(self):
            parts = [f"{self.name}.{i}" for i in "12"]
            return [self, *(Model(part, **layer(part)) for part in parts)]

    def layer(name):
        return {do: lambda do=do: print(do, name) for do in ("offload", "onload")}

    class Pipeline(BasePipeline):
        device_type, vram_management_enabled = "cpu", True
        def named_children(self):
            yield "dit", Model("dit")
            yield "vae", Model("vae", **layer("vae"))
            yield "plain", MagicMock(vram_management_enabled=False)

    print(Pipeline().load_models_to_device(["dit"]))
"""


def test_models_are_switched_on_a_device_without_a_cache(both):
    assert both.run(after("", MODELS)) == "real"
    switched = ["offload vae", "onload dit.1", "onload dit.2", "None"]
    assert both.run(after("diffsynth_core_vram.install()", MODELS)).splitlines() == switched


def test_a_version_that_was_not_tested_is_warned_of(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    environment.unpack(wheels.real)
    info = environment.site_packages / "diffsynth-2.1.12.dist-info"
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text().replace("2.1.12", "2.2.0"))
    info.rename(info.with_name("diffsynth-2.2.0.dist-info"))
    done = environment.start("-c", "import diffsynth_core_vram\ndiffsynth_core_vram.install()")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == (
        "<string>:2: UserWarning: diffsynth 2.2.0 is installed; diffsynth_core_vram was tested with 2.1.12. "
        "Compare results before you rely on them, or install a tested version."
    )


def test_a_tested_version_is_not_warned_of(both):
    done = both.start("-W", "error", "-c", "import diffsynth_core_vram; diffsynth_core_vram.install()")
    assert (done.returncode, done.stderr) == (0, "")


def test_uninstall_without_install_does_nothing(both):
    assert both.run(after("diffsynth_core_vram.uninstall()")) == "theirs"


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
