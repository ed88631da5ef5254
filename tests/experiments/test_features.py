"""The feature site: its files, bad input, and, where there is a browser, what a reader sees."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from activations import models
from activations.terminal import UserError
from evals.coding import frame
from evals.explore import Explorer
from experiments.features import __main__ as command
from experiments.features import site

M = 24


@pytest.fixture(scope="module")
def look(tiny_run: Path, tiny_model_dir: Path) -> Explorer:
    return Explorer(tiny_run, model=models.load(f"dir:{tiny_model_dir}"))


@pytest.fixture(scope="module")
def pages(look: Explorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "features"
    site.write(look, out, overwrite=False)
    return out


def data(page: Path) -> dict[str, Any]:
    found = re.search(r"const FEATURE = (.*);</script>", page.read_text())
    assert found
    return json.loads(found[1])


# Files.


def test_a_page_has_what_is_known_of_its_feature(look: Explorer, pages: Path) -> None:
    assert len(list(pages.glob("features/*.html"))) == M
    atoms = frame(look.run.coder)[0][:M]
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    cosine = unit @ unit.T - np.eye(M)
    dense = look.activity.codes.toarray() != 0
    for i in (0, 5, M - 1):
        told = data(pages / f"features/{i}.html")
        facts = dict(told["facts"])
        assert facts["density"] == pytest.approx(dense[:, i].mean(), rel=1e-3)
        assert [j for j, _ in told["near"]] == list(np.argsort(-np.abs(cosine[i]))[:8])
        assert told["near"][0][1] == pytest.approx(cosine[i][told["near"][0][0]], rel=1e-3)
        for j, share in told["together"]:
            both = (dense[:, i] & dense[:, j]).sum() / (dense[:, i] | dense[:, j]).sum()
            assert share == pytest.approx(both, rel=1e-3)
        assert sum(told["histogram"]["counts"]) == dense[:, i].sum()
        for name, sign in (("positive", 1), ("negative", -1)):
            tops = [one["codes"][str(one["at"])] * sign for one in told["contexts"][name]]
            assert tops == sorted(tops, reverse=True)
            assert all(code > 0 for code in tops)
        assert len(told["lens"]["up"]) == 10


def test_what_steering_and_a_judge_said_is_shown(
    look: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered = {"concept": "nurse", "feature": 3, "strength": 2.0, "kl": 0.5, "effect": 0.1,
               "fluent": None, "text": "I think that"}  # fmt: skip
    rows = {
        "steering": [steered, steered | {"feature": None}],
        "autointerp": [{"latent": 4, "explanation": "dogs <b>"}, {"latent": 5}],
    }
    monkeypatch.setattr(site, "_details", lambda _, family: rows[family])
    site.write(look, tmp_path / "site", overwrite=False)
    told = data(tmp_path / "site/features/3.html")["steering"]
    assert told == [["nurse", 0.5, 0.1, "", "I think that"]]
    assert data(tmp_path / "site/features/4.html")["label"] == "dogs <b>"
    assert "dogs <b>" not in (tmp_path / "site/index.js").read_text()


def test_a_run_without_its_store_says_so_and_shows_the_rest(look: Explorer, tmp_path: Path) -> None:
    import dataclasses

    metadata = look.run.metadata | {"store": {"path": "nowhere", "manifest_sha256": ""}}
    bare = Explorer(dataclasses.replace(look.run, metadata=metadata), model=look.model)
    site.write(bare, tmp_path / "site", overwrite=False)
    told = data(tmp_path / "site/features/2.html")
    assert told["contexts"] is told["together"] is None
    assert "nowhere" in told["without"]
    assert told["near"]
    assert told["lens"]


def test_a_model_that_is_not_there_leaves_out_the_lens(look: Explorer, tmp_path: Path) -> None:
    import dataclasses

    told = {key: value for key, value in look.run.metadata["model"].items() if key != "spec"}
    bare = Explorer(dataclasses.replace(look.run, metadata=look.run.metadata | {"model": told}))
    site.write(bare, tmp_path / "site", overwrite=False)
    page = data(tmp_path / "site/features/2.html")
    assert page["lens"] is None
    assert page["contexts"]


def test_common_firings_are_counted_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = scipy.sparse.random_array((200, 30), density=0.2, rng=np.random.default_rng(0))
    codes = scipy.sparse.csc_array(codes)
    whole = site._together(codes)
    monkeypatch.setattr(site, "_BLOCK", 7)
    assert site._together(codes) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "0"], "--rows: expected at least 1"), ([], "holds a site; pass --overwrite")],
)
def test_mistakes_are_told(
    pages: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    argv = ["features", str(tiny_run), "--out", str(pages), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        command.main()


def test_what_is_no_site_is_not_replaced(look: Explorer, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no site"):
        site.write(look, tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, which keeps what its console says."""
    if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("chrome"))):
        pytest.skip("no chromium and chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or shutil.which("chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def column(browser: Any, number: int) -> list[str]:
    return [
        cell.text for cell in browser.find_elements("css selector", f"#rows td:nth-child({number})")
    ]


def test_the_index_sorts_and_searches(browser: Any, pages: Path) -> None:
    browser.get((pages / "index.html").as_uri())
    assert browser.find_element("id", "count").text == f"{M} of {M} features"
    density = [float(text) for text in column(browser, 2)]
    assert density == sorted(density, reverse=True)
    heads = browser.find_elements("css selector", "#heads button")
    assert [head.text for head in heads] == list(site.COLUMNS)
    heads[1].click()
    assert [float(text) for text in column(browser, 2)] == density[::-1]
    heads[0].click()
    assert column(browser, 1) == [str(i) for i in range(M)]
    from selenium.webdriver.common.keys import Keys

    body = browser.find_element("tag name", "body")
    body.send_keys("/")
    search = browser.switch_to.active_element
    assert search.get_attribute("id") == "search"
    search.send_keys("7")
    assert "7" in column(browser, 1)
    label = next(text for text in column(browser, 6) if text.strip())
    search.send_keys(Keys.BACKSPACE, label)
    assert label in column(browser, 6)
    assert browser.get_log("browser") == []


def test_a_feature_opens_and_the_keyboard_goes_on(browser: Any, pages: Path) -> None:
    browser.get((pages / "index.html").as_uri())
    first = browser.find_element("css selector", "#rows a")
    number = int(first.text)
    first.click()
    assert browser.find_element("tag name", "h1").text == f"feature {number}"
    shaded = browser.find_elements("css selector", ".context span")
    assert shaded
    assert all("rgba" in span.value_of_css_property("background-color") for span in shaded)
    from selenium.webdriver.common.keys import Keys

    way, step = (Keys.ARROW_RIGHT, 1) if number + 1 < M else (Keys.ARROW_LEFT, -1)
    browser.find_element("tag name", "body").send_keys(way)
    assert browser.find_element("tag name", "h1").text == f"feature {number + step}"
    assert browser.get_log("browser") == []


def test_text_with_markup_is_shown_and_not_executed(browser: Any, pages: Path) -> None:
    """The corpus holds a script element, a control character, and one that turns the text round."""
    from selenium.common.exceptions import NoAlertPresentException

    seen = ""
    for i in range(M):
        browser.get((pages / f"features/{i}.html").as_uri())
        with pytest.raises(NoAlertPresentException):
            _ = browser.switch_to.alert.text
        assert len(browser.find_elements("css selector", "main script")) == 0
        seen += browser.find_element("tag name", "main").text
    assert "script" in seen
    assert "\u202e" not in seen
    assert "\x07" not in seen
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser: Any, pages: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get((pages / "features/0.html").as_uri())

    def colour(name: str) -> np.ndarray:
        script = (
            "const c = document.createElement('canvas').getContext('2d');"
            f"c.fillStyle = '{name}'; c.fillRect(0, 0, 1, 1);"
            "return [...c.getImageData(0, 0, 1, 1).data];"
        )
        return np.array(browser.execute_script(script), float)

    text = browser.find_element("tag name", "body").value_of_css_property("color")
    ground = np.array([255.0] * 3 if scheme == "light" else [18.0] * 3)
    for span in browser.find_elements("css selector", ".context span"):
        r, g, b, alpha = colour(span.value_of_css_property("background-color"))
        shown = alpha / 255 * np.array([r, g, b]) + (1 - alpha / 255) * ground
        assert contrast(colour(text)[:3], shown) >= 4.5


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """WCAG 2's contrast ratio of two colours."""

    def luminance(colour: np.ndarray) -> float:
        share = colour / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
