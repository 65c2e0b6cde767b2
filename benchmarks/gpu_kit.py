"""Pack what `gpu_7b.py` needs into one folder and one tar file, for a machine with a GPU and no
package index.

    .venv/bin/python benchmarks/gpu_kit.py 130 --python 3.12 --out dist/gpu_kit

130 is the CUDA version of the torch there (`torch.version.cuda`, 13.0), of which alone the
bitsandbytes wheel keeps its library; 3.12 is the Python there, on Linux and x86-64. That machine
brings torch and numpy (and pytest, for the tests); all else comes in the versions that are
installed here. There: `bash install.sh`, which says how to go on. Needs a package index here.
Refuses a kit of more than 60 MB.
"""

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from importlib.metadata import requires, version
from pathlib import Path
from subprocess import DEVNULL
from zipfile import ZIP_DEFLATED, ZipFile

from harness import command_line
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOTS = (
    "accelerate",
    "bitsandbytes",
    "filelock",
    "joblib",
    "peft",
    "psutil",
    "pydantic",
    "pyyaml",
    "safetensors",
    "transformers",
)
"""Packages that qpruner imports in the benchmark."""
THERE = ("numpy", "torch")
"""Packages that the machine has already."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28)] + [
    "manylinux2014_x86_64"
]
LARGEST_BYTES = 60_000_000
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")


def required(roots: Iterable[str], left_out: Collection[str] = ()) -> list[str]:
    """Names of packages and of all that they require here."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name not in found and name not in left_out:
            found.add(name)
            asked = map(Requirement, requires(name) or ())
            left += [
                each.name
                for each in asked
                if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return sorted(found)


def download(wheels: Path, python: str) -> None:
    """Fetch the wheels for another Python, and build qpruner's own."""
    tags = ["--python-version", python, "--implementation", "cp"]
    tags += [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    tags += [f"--platform={platform}" for platform in PLATFORMS]
    packages = [f"{name}=={version(name)}" for name in required(ROOTS, THERE)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", *tags, "--dest", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *packages], check=True)
    # By way of a source archive: a build in place would take up modules that an earlier one left.
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(wheels), str(ROOT)],
        check=True,
        stdout=DEVNULL,
    )
    for archive in wheels.glob("*.tar.gz"):
        archive.unlink()


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Write a bitsandbytes wheel anew with its CPU library and one for CUDA, and its RECORD without
    the others."""
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    libraries = {name: found[1] for name in files if (found := LIBRARY.fullmatch(name))}
    if f"cuda{cuda}" not in libraries.values():
        known = sorted(
            name.removeprefix("cuda") for name in libraries.values() if name.startswith("cuda")
        )
        raise SystemExit(
            f"{wheel.name} has no library for CUDA {cuda}: give one of {', '.join(known)}"
        )
    for name, kind in libraries.items():
        if kind not in ("cpu", f"cuda{cuda}"):
            del files[name]
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rows = [
        row for row in csv.reader(io.StringIO(files[record].decode())) if row and row[0] in files
    ]
    listed = io.StringIO()
    csv.writer(listed, lineterminator="\n").writerows(rows)
    files[record] = listed.getvalue().encode()
    with ZipFile(wheel, "w", ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def copy_sources(folder: Path) -> None:
    """The benchmark, and the tests marked `gpu` with what they import."""
    (folder / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").glob("gpu_*.py"):
        shutil.copy(path, folder / "benchmarks")
    for name in ("prune_7b.py", "harness.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    shutil.copy(ROOT / "benchmarks" / "gpu_install.sh", folder / "install.sh")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> None:
    """Make the folder, weigh it, pack it."""
    parser = command_line(__doc__)
    parser.add_argument("cuda", help="such as 128 for CUDA 12.8")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--out", type=Path, default=Path("dist/gpu_kit"))
    arguments = parser.parse_args()
    folder: Path = arguments.out
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    download(folder / "wheels", arguments.python)
    (wheel,) = (folder / "wheels").glob("bitsandbytes-*.whl")
    keep_one_library(wheel, arguments.cuda)
    copy_sources(folder)
    packed = Path(shutil.make_archive(str(folder), "tar", folder.parent, folder.name))
    size = packed.stat().st_size
    for path in sorted((folder / "wheels").iterdir(), key=lambda path: -path.stat().st_size):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")
    if size > LARGEST_BYTES:
        raise SystemExit(
            f"{packed} has {size / 1e6:.1f} MB, more than {LARGEST_BYTES / 1e6:.0f}: "
            "see what is large above"
        )
    print(
        f"{size / 1e6:6.1f} MB  {packed}: there, unpack it and run "
        f"`bash {folder.name}/install.sh PYTHON`"
    )


if __name__ == "__main__":
    main()
