import base64
import csv
import hashlib
import io
import re
import stat
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu_wheels

_TAGS = "py3-none-manylinux_2_24_x86_64"
_DIST = "bitsandbytes-0.50.2.dist-info"
_METADATA = (
    "Metadata-Version: 2.4\nName: bitsandbytes\nVersion: 0.50.2\nSummary: Optimizers.\n"
    "License-File: LICENSE\n\nVersion: 1 is what a reader sees.\n"
)
_LIBRARIES = ("cpu", "cuda118", "cuda130", "cuda132", "rocm72", "xpu2026")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel as bitsandbytes publishes it, with libraries of a few bytes."""
    wheel = tmp_path_factory.mktemp("published") / f"bitsandbytes-0.50.2-{_TAGS}.whl"
    files = {
        "bitsandbytes/__init__.py": "KIND = 'fake'\n",
        **{f"bitsandbytes/libbitsandbytes_{name}.so": name * 99 for name in _LIBRARIES},
        f"{_DIST}/METADATA": _METADATA,
        f"{_DIST}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {_TAGS}\n",
        f"{_DIST}/licenses/LICENSE": "MIT\n",
        f"{_DIST}/RECORD": "bitsandbytes/__init__.py,sha256=of-before,1\n",
        f"{_DIST}/RECORD.jws": "a signature of the published record",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
            entry.external_attr = (stat.S_IFREG | (0o755 if ".so" in name else 0o644)) << 16
            archive.writestr(entry, content)
    return wheel


@pytest.fixture(scope="module")
def trimmed(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_wheels.trimmed(published, "130", tmp_path_factory.mktemp("trimmed"))


def test_one_cuda_library_is_left_beside_that_of_the_cpu(trimmed: Path) -> None:
    assert trimmed.name == f"bitsandbytes-0.50.2+cuda130only-{_TAGS}.whl"
    dist = "bitsandbytes-0.50.2+cuda130only.dist-info"
    with zipfile.ZipFile(trimmed) as archive:
        assert set(archive.namelist()) == {
            "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so",
            "bitsandbytes/libbitsandbytes_cuda130.so", f"{dist}/METADATA", f"{dist}/WHEEL",
            f"{dist}/licenses/LICENSE", f"{dist}/RECORD",
        }  # fmt: skip
        library = archive.getinfo("bitsandbytes/libbitsandbytes_cuda130.so")
        assert archive.read(library) == b"cuda130" * 99
        assert library.external_attr >> 16 == stat.S_IFREG | 0o755
        metadata = archive.read(f"{dist}/METADATA").decode()
    assert metadata == _METADATA.replace("Version: 0.50.2", "Version: 0.50.2+cuda130only").replace(
        "Optimizers.", "Optimizers. (Trimmed: of its CUDA libraries only that for 13.0.)"
    )


def test_the_record_is_that_of_the_files(trimmed: Path) -> None:
    with zipfile.ZipFile(trimmed) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {row[0] for row in rows} == contents.keys()
    assert len(rows) == len(contents)
    for path, digest, size in rows:
        if path == record:
            assert (digest, size) == ("", "")
            continue
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(contents[path]).digest()).decode()
        assert digest == f"sha256={sha256.rstrip('=')}"
        assert int(size) == len(contents[path])


def test_pip_installs_it_without_an_index(trimmed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install",
        "--no-index", "--no-deps", "--no-compile", "--find-links", str(trimmed.parent),
        "--target", str(tmp_path), "bitsandbytes>=0.50",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bitsandbytes/libbitsandbytes_cuda130.so").is_file()
    (dist,) = tmp_path.glob("*.dist-info")
    assert dist.name == "bitsandbytes-0.50.2+cuda130only.dist-info"


def test_a_cuda_that_has_no_library_is_named_with_those_that_have(
    published: Path, tmp_path: Path
) -> None:
    message = f"--cuda 131: {published.name} has libraries for 118, 130, 132; did you mean 13"
    with pytest.raises(ValueError, match=re.escape(message)):
        gpu_wheels.trimmed(published, "131", tmp_path)
    assert not list(tmp_path.iterdir()), "half a wheel"


@pytest.fixture
def pythons(monkeypatch: pytest.MonkeyPatch, published: Path) -> list[str]:
    """Has the wheels come from here; the versions of Python that they are requested for."""
    requested: list[str] = []

    def download(folder: Path, python: str) -> None:
        requested.append(python)
        (folder / published.name).write_bytes(published.read_bytes())
        (folder / "psutil-7.2.2-cp36-abi3-manylinux2010_x86_64.whl").write_bytes(b"0")

    monkeypatch.setattr(gpu_wheels, "download", download)
    return requested


def test_the_folder_holds_the_wheels_of_the_last_time_alone(
    pythons: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "wheels"
    for cuda in ("118", "130"):
        assert gpu_wheels.main(["--folder", str(folder), "--cuda", cuda, "--python", "3.13"]) == 0
    assert pythons == ["3.13", "3.13"]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"bitsandbytes-0.50.2+cuda130only-{_TAGS}.whl",
        "psutil-7.2.2-cp36-abi3-manylinux2010_x86_64.whl",
    ]
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.endswith(f"--no-index --find-links {folder} bitsandbytes jaxtyping psutil")
    monkeypatch.setattr(gpu_wheels, "MAX_BYTES", 100)
    assert gpu_wheels.main(["--folder", str(folder)]) == 1
    assert "more than 0 MB" in capsys.readouterr().err


def test_a_folder_with_other_files_stays_as_it_is(
    pythons: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        gpu_wheels.main(["--folder", str(tmp_path)])
    assert ended.value.code == 2
    assert "holds what is not a wheel: notes.txt" in capsys.readouterr().err
    assert pythons == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def _with_needs(names: set[str]) -> set[str]:
    """Distributions and all that they need, of those that are installed here."""
    found: set[str] = set()
    waiting = {canonicalize_name(name) for name in names}
    while waiting:
        found.add(name := waiting.pop())
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting |= {canonicalize_name(needed.name)} - found
    return found


def test_the_wheels_need_nothing_else_that_is_not_there() -> None:
    there = _with_needs({"torch", "lightning", "transformers"})
    brought = {*gpu_wheels.NEEDED, *gpu_wheels.ALSO}
    assert _with_needs(set(gpu_wheels.NEEDED)) - there == brought
