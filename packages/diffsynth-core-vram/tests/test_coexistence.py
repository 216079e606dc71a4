"""This distribution beside a real ``diffsynth``: one of them answers, and neither breaks the other.

Where it counts, pip itself installs and uninstalls, so that only their RECORD says what belongs to whom.
"""

import importlib.metadata
import os
import textwrap

import pytest

pytestmark = pytest.mark.slow

WHO_ANSWERS = """
    import diffsynth
    import diffsynth.core.vram.layers as layers
    from diffsynth.core import AutoWrappedLinear, DiskMap, load_model, skip_model_initialization
    from diffsynth.core.vram.disk_map import DiskMap as same
    assert diffsynth.AutoWrappedLinear is AutoWrappedLinear is layers.AutoWrappedLinear
    assert DiskMap is same
    print("ours" if "diffsynth_core_vram" in layers.__file__ else "real")
"""


@pytest.fixture(scope="module", params=["ours, then the real one", "the real one, then ours"])
def both(request, empty_environment, wheels, tmp_path_factory):
    """An environment into which pip has installed both distributions, in either order."""
    environment = empty_environment.copy_to(tmp_path_factory.mktemp("both") / "venv")
    in_order = [wheels.ours, wheels.real] if request.param.startswith("ours") else [wheels.real, wheels.ours]
    for wheel in in_order:
        environment.install(wheel)
    return environment


def assert_whole(environment, files):
    for path, content in files.items():
        assert (environment.site_packages / path).read_bytes() == content, path


def assert_gone(environment, files):
    assert [path for path in files if (environment.site_packages / path).exists()] == []


def test_wheel_as_built_holds_these_files(our_files):
    try:
        installed = importlib.metadata.distribution("diffsynth-core-vram")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree")
    if (installed.read_text("direct_url.json") or "").find('"editable": true') >= 0:
        pytest.skip("an editable install has no files of its own")
    paths = {path.as_posix() for path in installed.files if path.suffix != ".pyc"}
    assert {path for path in paths if ".dist-info/" not in path} == our_files.keys()


def test_distributions_share_no_file(our_files, real_files):
    assert {path for path in our_files if path.startswith("diffsynth/")} == set()
    assert not our_files.keys() & real_files.keys()


def test_ours_answers_alone(environment, wheels):
    environment.unpack(wheels.ours)
    assert environment.run(WHO_ANSWERS) == "ours"


def test_real_one_answers_when_both_are_installed(both, our_files, real_files):
    assert both.run(WHO_ANSWERS) == "real"
    assert_whole(both, our_files)
    assert_whole(both, real_files)


def test_real_one_is_whole_after_ours_is_uninstalled(both, tmp_path, our_files, real_files):
    environment = both.copy_to(tmp_path / "venv")
    environment.uninstall("diffsynth-core-vram")
    assert_gone(environment, our_files)
    assert_whole(environment, real_files)
    assert environment.run(WHO_ANSWERS) == "real"


def test_ours_answers_after_the_real_one_is_uninstalled(both, tmp_path, our_files, real_files):
    environment = both.copy_to(tmp_path / "venv")
    environment.uninstall("diffsynth")
    assert_gone(environment, real_files)
    assert_whole(environment, our_files)
    assert environment.run(WHO_ANSWERS) == "ours"


def test_editable_real_one_answers(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    environment.unpack(wheels.real, tmp_path / "checkout")
    (environment.site_packages / "diffsynth.pth").write_text(f"{tmp_path / 'checkout'}\n")
    assert environment.run(WHO_ANSWERS) == "real"


def test_editable_real_one_answers_through_an_import_hook(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    environment.unpack(wheels.real, tmp_path / "checkout")
    hook = f"""
        import sys
        from importlib.util import spec_from_file_location

        class Finder:
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name == "diffsynth":
                    return spec_from_file_location(name, {str(tmp_path / "checkout/diffsynth/__init__.py")!r})

        sys.meta_path.append(Finder)
    """
    (environment.site_packages / "_editable_diffsynth.py").write_text(textwrap.dedent(hook))
    (environment.site_packages / "diffsynth.pth").write_text("import _editable_diffsynth\n")
    assert environment.run(WHO_ANSWERS) == "real"


def test_real_one_answers_from_outside_with_system_site_packages(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    configuration = environment.folder / "pyvenv.cfg"
    configuration.write_text(configuration.read_text().replace("= false", "= true"))
    assert "include-system-site-packages = true" in configuration.read_text()
    environment.variables["PYTHONUSERBASE"] = str(tmp_path / "outside")
    outside = environment.run("import site; print(site.getusersitepackages())")
    assert environment.run(WHO_ANSWERS) == "ours"
    os.makedirs(outside)
    environment.unpack(wheels.real, outside)
    assert environment.run(WHO_ANSWERS) == "real"


def test_second_copy_of_ours_does_not_hide_the_real_one(environment, wheels, tmp_path):
    for folder in (environment.site_packages, tmp_path / "second"):
        environment.unpack(wheels.ours, folder)
    environment.unpack(wheels.real, tmp_path / "checkout")
    (environment.site_packages / "more.pth").write_text(f"{tmp_path / 'second'}\n{tmp_path / 'checkout'}\n")
    assert environment.run(WHO_ANSWERS) == "real"


def test_folder_of_that_name_is_no_package(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    (tmp_path / "work" / "diffsynth").mkdir(parents=True)
    assert environment.run(WHO_ANSWERS, cwd=tmp_path / "work") == "ours"


def test_fault_of_the_real_one_is_not_hidden(environment, wheels, tmp_path):
    environment.unpack(wheels.ours)
    (tmp_path / "checkout" / "diffsynth").mkdir(parents=True)
    (tmp_path / "checkout" / "diffsynth" / "__init__.py").write_text("import a_dependency_that_is_absent")
    (environment.site_packages / "diffsynth.pth").write_text(f"{tmp_path / 'checkout'}\n")
    tried_twice = """
        import sys
        for attempt in range(2):
            try:
                import diffsynth
            except ModuleNotFoundError as error:
                print(error.name, "diffsynth" in sys.modules)
    """
    assert environment.run(tried_twice).splitlines() == ["a_dependency_that_is_absent False"] * 2
