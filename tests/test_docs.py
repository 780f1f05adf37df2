"""The site of docs/ builds without a warning, tells every setting, and fits a browser, wide and narrow, light and dark."""

import dataclasses
import functools
import html
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from dist_spin.config.help import field_docs, setting_groups
from dist_spin.config.run import RunConfig

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a link or anchor that leads nowhere is a warning, and a warning an error."""
    target = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))
    return target


def test_links_between_pages_and_to_sources_hold_on_the_site(site: Path) -> None:
    for page in site.glob("*.html"):
        for link in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', page.read_text(encoding="utf-8")):
            assert (site / link.lstrip("/")).exists(), (page.name, link)
    how = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert 'href="source/dist_spin/optimize/train.py.html"' in how
    assert "checkpoint" in (site / "source/dist_spin/optimize/train.py.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_sites_menu(site: Path) -> None:
    before, content, _ = (site / "index.html").read_text(encoding="utf-8").partition('<div class="md-content"')
    assert content
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in before, f"name docs/{page.name} under nav in mkdocs.yml"


def test_the_reference_has_every_setting_with_its_meaning_and_default(site: Path) -> None:
    text = html.unescape((site / "settings.html").read_text(encoding="utf-8"))
    rows = {
        re.findall("<code>(.*?)</code>", head)[0]: [re.sub("<[^>]+>", "", cell).strip() for cell in (head, meaning)]
        for head, meaning in re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", text, re.DOTALL)
    }
    groups = setting_groups()
    wanted = {f"{name}.{f.name}": (kind, f) for name, kind in groups.items() for f in dataclasses.fields(kind)}
    wanted |= {f.name: (RunConfig, f) for f in dataclasses.fields(RunConfig) if f.name not in groups}
    assert set(rows) == set(wanted)
    assert len(rows) > 90
    for name, (kind, field) in wanted.items():
        plain = functools.partial(re.sub, r"[^\w]", "")  # whatever Markdown makes of the punctuation
        assert plain(rows[name][1]) == plain(field_docs(kind)[field.name]), name
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert rows[name][0].endswith(f"default {field.default}")
    assert rows["model.path"][0] == "model.path str, required"
    assert rows["optimize.schedule"][0] == "optimize.schedule cosine · linear · constant, default cosine"
    assert rows["optimize.scales"][0] == "optimize.scales bool, default false"
    assert rows["model.revision"][0] == "model.revision str | null, default null"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served, on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_wide_and_a_narrow_window_say_nothing_on_the_console_and_fetch_nothing(
    browser: "Browser", address: str, scheme: str
) -> None:
    said: list[str] = []
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(address) else None)
        for name in ("index", "settings", "methods", "tutorial"):
            page.goto(f"{address}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 380
            assert light == (scheme == "light"), ground
        assert said == []
        page.close()
