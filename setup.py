"""What pyproject.toml cannot say: a module that stays out of the wheel."""

from setuptools import setup
from setuptools.command.build_py import build_py


class Without(build_py):
    """gptoss/tangle.py makes the book and needs the book's packages."""

    def find_package_modules(self, package, package_dir):
        return [found for found
                in super().find_package_modules(package, package_dir)
                if found[:2] != ("gptoss", "tangle")]


setup(cmdclass={"build_py": Without})
