"""Collects the wheels with which `gpu_check` runs on a machine that reaches no package index.

``python -m benchmarks.gpu_wheels --cuda 130``, which is ``make gpu-wheels CUDA=130``. The machine
has torch, lightning and transformers; what else `gpu_check` needs is downloaded for its Python. Of
bitsandbytes' libraries, one per version of CUDA and 60 MB together, the one that fits is kept.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fingpt_lightning.terminal.messages import nearest

MAX_BYTES = 25 * 10**6
NEEDED = ("bitsandbytes", "jaxtyping", "psutil")
"""What `gpu_check` imports beside torch, lightning, transformers and what these need."""
ALSO = ("wadler-lindig",)
"""What those need that comes with none of the three."""
_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_PLATFORMS = (
    # As old as torch's own wheels allow, the newest first.
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)),
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
)  # fmt: skip
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(?P<backend>[a-z]+)(?P<version>\d*)\.so")
_SIGNATURES = ("RECORD.jws", "RECORD.p7s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills the folder and says how its wheels are installed.

    Returns:
        0, or 1 where pip finds none or the wheels are larger than `MAX_BYTES`.
    """
    options, parser = _options(arguments)
    try:
        wheels = collect(options.folder, options.cuda, options.python)
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError:
        print("gpu_wheels: pip found no such wheels; its message is above", file=sys.stderr)
        return 1
    num_bytes = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{options.folder}: {len(wheels)} wheels, {num_bytes / 1e6:.1f} MB; on that machine:")
    print(f"python3 -m pip install --no-index --find-links {options.folder} {' '.join(NEEDED)}")
    if num_bytes > MAX_BYTES:
        print(f"gpu_wheels: more than {MAX_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0


def collect(folder: Path, cuda: str, python: str) -> list[Path]:
    """Downloads the wheels and puts them in place of those of an earlier time.

    Args:
        folder: Folder for the wheels.
        cuda: Digits of the CUDA version of the machine's torch, such as 130.
        python: Version of the machine's Python, such as 3.12.

    Raises:
        ValueError: The folder holds other files, or bitsandbytes has no library for this CUDA.
        CalledProcessError: pip finds no wheel, or no index.
    """
    earlier = list(folder.iterdir()) if folder.exists() else []
    if others := [path.name for path in earlier if path.suffix != ".whl"]:
        raise ValueError(f"--folder {folder} holds what is not a wheel: {', '.join(others[:3])}")
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch), python)
        (whole,) = Path(scratch).glob("bitsandbytes-*.whl")
        trimmed(whole, cuda, whole.parent)
        whole.unlink()
        for path in earlier:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(Path(scratch).iterdir())
        return [Path(shutil.move(wheel, folder / wheel.name)) for wheel in found]


def download(folder: Path, python: str) -> None:
    """Fetches the wheels for a Linux machine from the index that pip is set up with.

    Args:
        folder: Folder for the wheels.
        python: Version of the machine's Python.
    """
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--constraint", str(_CONSTRAINTS),
        "--implementation", "cp", "--python-version", python, *platforms,
        "--dest", str(folder), *NEEDED, *ALSO,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def trimmed(wheel: Path, cuda: str, folder: Path) -> Path:
    """A wheel of bitsandbytes with one of its CUDA libraries, and that for the CPU.

    Its version has ``+cuda130only`` behind it, so that nothing takes it for the published one.

    Args:
        wheel: Published wheel.
        cuda: Digits of the CUDA version.
        folder: Folder for the new wheel.

    Raises:
        ValueError: The wheel has no library for this version.
    """
    name, version, tags = wheel.stem.split("-", 2)
    local = f"{version}{'.' if '+' in version else '+'}cuda{cuda}only"
    before, after = (f"{name}-{v}.dist-info/" for v in (version, local))
    made = folder / f"{name}-{local}-{tags}.whl"
    with zipfile.ZipFile(wheel) as published:
        left_out = set(_other_libraries(published.namelist(), cuda, wheel.name))
    left_out |= {before + file for file in ("RECORD", *_SIGNATURES)}
    with zipfile.ZipFile(wheel) as published, zipfile.ZipFile(made, "w") as trimmed_wheel:
        record = io.StringIO()
        rows = csv.writer(record, lineterminator="\n")
        for entry in published.infolist():
            if entry.filename in left_out or entry.is_dir():
                continue
            content = published.read(entry)
            path = entry.filename
            if path.startswith(before):
                path = after + path.removeprefix(before)
            if path == f"{after}METADATA":
                content = _renamed(content, local, cuda)
            rows.writerow([path, f"sha256={_digest(content)}", len(content)])
            _add(trimmed_wheel, path, content, entry)
        rows.writerow([f"{after}RECORD", "", ""])
        last = published.getinfo(f"{before}RECORD")
        _add(trimmed_wheel, f"{after}RECORD", record.getvalue().encode(), last)
    return made


def _other_libraries(paths: Sequence[str], cuda: str, wheel: str) -> Iterator[str]:
    """Native libraries but those for the CPU and for one version of CUDA."""
    found = {path: match for path in paths if (match := _LIBRARY.fullmatch(path))}
    versions = [m["version"] for m in found.values() if m["backend"] == "cuda"]
    if cuda not in versions:
        raise ValueError(
            f"--cuda {cuda}: {wheel} has libraries for {', '.join(sorted(versions))}"
            f"{nearest(cuda, versions)}"
        )
    for path, match in found.items():
        if (match["backend"], match["version"]) not in (("cpu", ""), ("cuda", cuda)):
            yield path


def _renamed(metadata: bytes, version: str, cuda: str) -> bytes:
    """Metadata with another version, whose summary says what is left out."""
    headers, blank, body = metadata.partition(b"\n\n")
    headers = re.sub(rb"(?m)^Version: .*", f"Version: {version}".encode(), headers)
    note = f" (Trimmed: of its CUDA libraries only that for {cuda[:-1]}.{cuda[-1]}.)".encode()
    headers = re.sub(rb"(?m)^Summary: .*", lambda found: found[0] + note, headers)
    return headers + blank + body


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _add(wheel: zipfile.ZipFile, path: str, content: bytes, like: zipfile.ZipInfo) -> None:
    """Adds a file with the date and the mode of another."""
    entry = zipfile.ZipInfo(path, like.date_time)
    entry.external_attr, entry.compress_type = like.external_attr, zipfile.ZIP_DEFLATED
    wheel.writestr(entry, content)


def _options(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("gpu_wheels"), help="for the wheels")
    parser.add_argument("--cuda", default="130", help="torch.version.cuda there, without its dot")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    return parser.parse_args(arguments), parser


if __name__ == "__main__":
    sys.exit(main())
