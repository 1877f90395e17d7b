"""Takes the pictures of the guides, of reports and of the page of ``fingpt serve``, in a Chromium.

``python -m documentation.pictures --model models/smollm2-135m`` takes all; without a model those
of reports. The run of the report is the quickstart, trained now, if ``--run`` names no other.
"""

import argparse
import contextlib
import functools
import html
import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from typing_extensions import override

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MAX_BYTES = 150_000
ANSWER_S = 60.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FINGPT = (sys.executable, "-m", "fingpt_lightning")
_ASKED = {
    "prompt": "Why does a central bank raise its interest rate?",
    "text": "Operating profit rose to EUR 13.1 million from EUR 8.7 million a year before.",
    "task": "fpb",
}


class View(NamedTuple):
    """How a page is looked at.

    Attributes:
        width: Width of the window, in CSS pixels.
        height: Height of the window, in CSS pixels.
        is_dark: Whether the reader's system is dark.
        scale: Pixels of the picture per CSS pixel.
    """

    width: int
    height: int
    is_dark: bool = False
    scale: float = 1


VIEWS = {
    "light": View(1120, 1660),
    "dark": View(1120, 1660, is_dark=True),
    "phone": View(390, 1380, scale=2),
    "top": View(1120, 770),
}


def main(words: list[str] | None = None) -> None:
    """Reads the command line and takes the pictures."""
    parser = argparse.ArgumentParser(prog="python -m documentation.pictures", description=__doc__)
    parser.add_argument("--model", help="model to serve; none leaves out the page of the server")
    parser.add_argument("--adapters", help="NAME=FOLDER,...; the first one is asked")
    parser.add_argument("--run", type=Path, help="folder of a run; none trains the quickstart")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        page = folder / "report.html"
        run = options.run
        if run is None:
            run = folder / "quickstart"
            where = ("--trainer.default_root_dir", str(run))
            subprocess.run([*_FINGPT, "fit", "--config", "quickstart", *where], check=True)
        subprocess.run([*_FINGPT, "report", str(run), "--output", str(page)], check=True)
        with serving_folder(folder) as address:
            for name, view in VIEWS.items():
                take(f"{address}{page.name}", PICTURES / f"report_{name}.png", view)
        if options.model is not None:
            _take_server(options.model, options.adapters, folder)


def take(url: str, picture: Path, view: View, wait_s: float = 0) -> None:
    """Opens a page and keeps what the window shows.

    Args:
        url: Address of the page.
        picture: File to write, PNG of 256 colors.
        view: Window and system of the reader.
        wait_s: Seconds that the page gets for what it does after it was loaded.

    Raises:
        FileNotFoundError: There is no Chromium.
        ValueError: The picture is larger than ``MAX_BYTES``.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as scratch, _frame_around(url, view, wait_s) as frame:
        shot = Path(scratch) / "shot.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={Path(scratch) / 'browser'}",
            f"--window-size={max(view.width, 500)},{view.height + 100}",
            f"--force-device-scale-factor={view.scale}",
            *(["--blink-settings=preferredColorScheme=0"] if view.is_dark else []),
            f"--screenshot={shot}", frame,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(shot) as image:
            box = (0, 0, round(view.width * view.scale), round(view.height * view.scale))
            image.convert("RGB").crop(box).quantize(256).save(picture, optimize=True)
    if (num_bytes := picture.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{picture.name} has {num_bytes:,} bytes, more than {MAX_BYTES:,}")


@contextlib.contextmanager
def _frame_around(url: str, view: View, wait_s: float) -> Iterator[str]:
    """The address of a page that shows another one at the size of a view.

    A window is never narrower than 500 pixels, but a frame in it is. The browser keeps what it
    sees when all is loaded, so an image that comes late makes it wait.
    """
    size = f"width:{view.width}px;height:{view.height}px;border:0"
    page = (
        f"<!doctype html><body style='margin:0;overflow:hidden'><iframe src='{{}}' style='{size}'>"
    )
    page = page.format(html.escape(url)) + "</iframe><img src='late.png' style='display:none'>"

    class Answers(_Quiet):
        def do_GET(self) -> None:
            if self.path == "/late.png":
                time.sleep(wait_s)
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode() if self.path == "/" else b"")

    with _serving(Answers) as address:
        yield address


def serving_folder(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Serves a folder, at an address that ends with a slash, while the context is open."""
    return _serving(functools.partial(_Quiet, directory=str(folder)))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    @override
    def log_message(self, format: str, *words: object) -> None:
        """Keeps the terminal quiet."""


@contextlib.contextmanager
def _serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _take_server(model: str, adapters: str | None, folder: Path) -> None:
    log = folder / "serve.txt"
    words = [*_FINGPT, "serve", "--model", model, "--port", "0", "--tasks", "fpb"]
    words += ["--dtype", "float32"]  # auto is measured: pictures would differ
    words += ["--adapters", adapters] if adapters else []
    with log.open("w") as output:
        server = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text())):
            if server.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)
        asked = dict(_ASKED)
        if adapters:
            asked["model"] = adapters.partition("=")[0]
        url = f"{found[1]}/?{urllib.parse.urlencode(asked)}"
        for name, width, height in (
            ("light", 820, 1060),
            ("dark", 820, 1060),
            ("phone", 390, 1240),
        ):
            view = VIEWS[name]._replace(width=width, height=height)
            take(url, PICTURES / f"serve_{name}.png", view, wait_s=ANSWER_S)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
