"""All metadata is in settings.ini; every field named in pyproject.toml's `dynamic` list is passed from there."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    license_expression=cfg["license_spdx"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={key: cfg[f"{key}_requirements"].split() for key in ("notebook", "train", "export", "dev")},
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    entry_points={"console_scripts": [f"diffusion-book={cfg['lib_path']}.cli:main"]},
    package_data={cfg["lib_path"]: ["py.typed", "weights/*"]},
)
