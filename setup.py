"""Adds to pyproject.toml what a table can't say: csrc travels inside the package, and native parts are optional."""

import contextlib
import importlib.util
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_recipe():
    """fastewc/_build.py without importing fastewc, which needs torch."""
    spec = importlib.util.spec_from_file_location("fastewc_build", ROOT / "fastewc" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe()


class BuildNative(build_ext):
    """Compiles by the same recipe as ``python -m fastewc build``; whatever is missing, the install goes on."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # a library of an earlier build must not pass for this one's
        device_type = ext.name.rpartition("._")[2]
        try:
            recipe.compile_library(device_type, target)
        except recipe.BuildError as error:
            kernels = f"{device_type.upper()} kernels"
            self.warn(f"fastewc is installed without its {kernels}: {error}\n`{recipe.COMMAND}` adds them later.")


def native_parts():
    """One extension, or with nvcc two, where torch can be compiled against; else none: a pure-Python wheel."""
    try:
        recipe.torch_folder()
    except recipe.BuildError:
        return []
    device_types = ["cpu"]
    with contextlib.suppress(recipe.BuildError):
        recipe.compiler("cuda")
        device_types.append("cuda")
    return [Extension(f"fastewc._{name}", sources=[], py_limited_api=True, optional=True) for name in device_types]


csrc = {f"fastewc.{name}": name.replace(".", "/") for name in find_namespace_packages(include=["csrc", "csrc.*"])}
setup(
    license="MIT",
    packages=[*find_namespace_packages(include=["fastewc", "fastewc.*"]), *csrc],
    package_dir=csrc,
    package_data={"fastewc": ["py.typed"], **{name: ["*.h", "*.cpp", "*.cu"] for name in csrc}},
    ext_modules=native_parts(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
