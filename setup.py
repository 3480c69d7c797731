"""Which files `pip install .` takes; everything else about the package is in pyproject.toml.

The folders of the project have plain names, as `datasets` and `utils`, which other packages have
too. So all of them are installed below one package, `samed.project`.
"""

import tempfile

from setuptools import find_packages, setup

NOT_INSTALLED = ("samed*", "tests*", "benchmarks*")
TEXTS = ["*.html", "*.css", "*.js", "*.json", "*.md"]  # pages and tables beside the code
DATA = ["ablations/*.toml", "recipes/*.json", "lists/*/*.txt", "LICENSE"]


def main() -> None:
    """Do what pip asks for."""
    parts = [f"samed.project.{name}" for name in find_packages(exclude=NOT_INSTALLED)]
    # A folder of its own for every build: setuptools would also pack what an earlier one has left.
    with tempfile.TemporaryDirectory() as build:
        setup(
            package_dir={"samed": "samed", "samed.project": "."},
            packages=["samed", "samed.project", *parts],
            package_data={"samed.project": DATA} | dict.fromkeys(parts, TEXTS),
            include_package_data=False,
            options={"build": {"build_base": build}},
        )


if __name__ == "__main__":
    main()
