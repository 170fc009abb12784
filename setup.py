"""Adds to pyproject.toml what a table can't say: csrc travels inside the package, and native parts are optional."""

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
        try:
            recipe.compile_library(target)
        except recipe.BuildError as error:
            self.warn(f"fastewc is installed without its native parts: {error}\n`{recipe.COMMAND}` adds them later.")


def native_parts():
    """The extension where torch can be compiled against; else none, and the wheel is tagged pure Python."""
    try:
        recipe.torch_folder()
    except recipe.BuildError:
        return []
    return [Extension("fastewc._cpu", sources=[], py_limited_api=True, optional=True)]


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
