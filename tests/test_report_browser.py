"""The page of `mspc report` in a real browser, light and dark. Run by `make test-report`; look at its screenshots."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import tiny
from PIL import Image

import mspc

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]
WIDTHS = (800, 1280)
FRAME = """<!doctype html><iframe src="{name}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>document.querySelector("iframe").onload = (event) => {{
  const page = event.target.contentDocument.documentElement
  document.title = page.scrollWidth + " in " + page.clientWidth
}}</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium on a page, with the console on stderr."""
    own = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *own, profile, *options, page.as_uri()]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, stdin=subprocess.DEVNULL, env=os.environ
    )


def console(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two artifacts with awkward names, with all that a page can have."""
    folder = tmp_path_factory.mktemp("report")
    text = folder / "<img src=x onerror=alert(1)>.txt"
    text.write_text(tiny.text(3000, seed=1))
    model = tiny.build(folder / "<script>alert('1')<script>", "llama")
    options = {"iterations": 2, "sensitivity_sequences": 2, "eval": True}
    tiny.compress(model, folder / "half <b>", text, **options)
    tiny.compress(model, folder / "int4", text, sparsity=0.2, bits=4, group_size=32, **options)
    out = folder / "page.html"
    return mspc.report(
        [folder / "half <b>", folder / "int4"], out, against=model, text=str(text), sequence_length=32, max_windows=8,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_is_readable_in_both_themes(page, theme, width):
    """Oracle: the pixels of the screenshot, and an empty console."""
    shot = page.parent / f"{theme}-{width}.png"
    chosen = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    done = browse(page, f"--window-size={width},6000", f"--screenshot={shot}", *chosen)
    assert console(done.stderr) == []
    pixels = numpy.asarray(Image.open(shot).convert("L"), dtype=float)
    assert pixels.shape == (6000, width)
    paper = numpy.median(pixels)
    assert paper > 240 if theme == "light" else paper < 40
    far = numpy.abs(pixels - paper) > 150  # ink
    assert 0.003 < far.mean() < 0.2
    assert far[:1500].any(1).mean() > 0.1
    plot = pixels[200:560]  # the frontier is under the title
    assert (numpy.abs(plot - paper) > 60).mean() > 0.001


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(page, width):
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(name=page.name, width=width))
    found = browse(frame, "--allow-file-access-from-files", "--dump-dom").stdout
    match = re.search(r"<title>(\d+) in (\d+)</title>", found)
    assert match
    assert int(match[1]) <= int(match[2]) == width


def test_a_script_would_be_blocked_and_seen(page):
    """The check of the console finds what the policy of the page blocks."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    done = browse(broken, "--dump-dom")
    assert len(console(done.stderr)) == 1
    assert "Content Security Policy" in done.stderr
    assert "<title>ran" not in done.stdout
