"""The page in a browser: words respond, images change, nothing is fetched and no error occurs."""
import html
import json
import re
import subprocess

import numpy as np
import pytest
from helpers import CHROMIUM

from captioning.report.page import page_entry, write_page

METHODS = ["lrp", "attention"]
WALK = """
<script>
const log = [], errors = []
addEventListener("error", event => errors.push(String(event.message)))
console.error = (...parts) => errors.push(parts.join(" "))
const key = name => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}))
function note(action) {
  const words = [...document.querySelectorAll("#caption button")]
  log.push({ action, words: words.map(b => b.textContent), chosen: words.findIndex(b => b.ariaPressed === "true"),
    colours: words.map(b => b.style.backgroundColor), on: $("stage").classList.contains("on"), heat: $("heat").src,
    image: $("image").src, methods: [...document.querySelectorAll("#methods input")].map(i => i.value),
    stage: $("stage").clientWidth,
    detail: $("detail").innerText, legend: $("legend").innerText,
    wide: document.documentElement.scrollWidth > innerWidth })
}
addEventListener("load", () => {
  const word = i => document.querySelectorAll("#caption button")[i]
  note("start")
  word(2).dispatchEvent(new MouseEvent("mouseenter")); note("hover")
  key("ArrowRight"); note("right")
  key("ArrowLeft"); note("left")
  document.querySelector("input[value=attention]").click(); note("attention")
  key("m"); note("m")
  word(3).focus(); note("focus")
  key("Escape"); note("escape")
  key("ArrowDown"); note("down")
  key("m")
  word(1).click(); note("tap")
  $("opacity").value = 0.5
  $("opacity").dispatchEvent(new Event("input"))
  log.at(-1).opacity = getComputedStyle(document.documentElement).getPropertyValue("--opacity")
  dispatchEvent(new Event("beforeprint"))
  log.at(-1).printed = document.querySelectorAll("#paper figure").length
  dispatchEvent(new Event("afterprint"))
  document.body.append(make("pre", { id: "log", textContent: JSON.stringify({ log, errors }) }))
})
</script>
"""


def arrays(words, methods=METHODS, seed=0):
    """The contents of an explanation.npz, with random numbers."""
    rng, T = np.random.default_rng(seed), len(words) - 1
    best = np.array([["a", "cat", "dog", "on", "<end>"]] * T)
    ps = np.sort(rng.uniform(0, 0.3, (T, 5)))[:, ::-1]
    maps = rng.normal(size=(T, 40, 40)).astype(np.float32)
    entry = {"words": np.array(words), "methods": np.array(methods), "contrast": np.array(""), "alternatives": best,
             "alternative_probabilities": ps, "probabilities": np.full(T, 0.25), "lrp_words": rng.normal(size=(T, T)),
             "lrp_pixels": maps, "attention_pixels": np.abs(maps), "gradient_pixels": -maps}
    entry["lrp_words"][1, :2] = 2.0, -1.0
    return entry


@pytest.fixture
def page(tmp_path):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (60, 80 + 200 * i, 3), dtype=np.uint8) for i in range(2)]
    captions = [["<start>", "a", "dog", "</script><b>", "<end>"], ["<start>", "two", "cats", "<end>"]]
    write_page(tmp_path / "index.html", [page_entry(f"image {i}", images[i], arrays(captions[i], methods, seed=i))
                                         for i, methods in enumerate([METHODS, ["attention", "gradient"]])])
    return tmp_path / "index.html"


def test_nothing_is_fetched_and_words_are_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src\s*=\s*[\"'](?!data:)|href\s*=|@import|url\(", text)
    assert text.count("</script>") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: install Debian's package chromium")
@pytest.mark.parametrize("width", [500, 900, 1600])     # 500: the narrowest headless window
def test_in_a_browser(page, tmp_path, width):
    page.write_text(page.read_text(encoding="utf-8").replace("<header>", WALK + "<header>", 1), encoding="utf-8")
    process = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},800", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="log">(.*?)</pre>', process.stdout, re.S)
    assert match, process.stderr[-2000:]
    result = json.loads(html.unescape(match[1]))
    assert result["errors"] == []
    seen = {entry["action"]: entry for entry in result["log"]}
    assert seen["start"]["words"] == ["<start>", "a", "dog", "</script><b>", "<end>"] and not seen["start"]["on"]
    assert seen["hover"]["chosen"] == 2 and seen["hover"]["on"]
    assert "“dog”: probability 25.0\u00a0%" in seen["hover"]["detail"]
    assert "cat" in seen["hover"]["detail"] and "±" in seen["hover"]["legend"]
    assert seen["hover"]["legend"].startswith("opposes the word") and "supports the word;" in seen["hover"]["legend"]
    colours = seen["hover"]["colours"]          # <start>: +2; a: −1; later words: none
    assert "--positive" in colours[0] and "0.6" in colours[0] and "--negative" in colours[1] and "0.3" in colours[1]
    assert not any(colours[2:])
    assert seen["right"]["chosen"] == 3 and seen["right"]["heat"] != seen["hover"]["heat"] == seen["left"]["heat"]
    assert seen["attention"]["chosen"] == 2 and seen["attention"]["heat"] != seen["left"]["heat"] == seen["m"]["heat"]
    assert not any(seen["attention"]["colours"]) and "±" not in seen["attention"]["legend"]
    assert seen["attention"]["legend"].startswith("low")
    assert seen["focus"]["chosen"] == 3 and seen["escape"]["chosen"] == -1 and not seen["escape"]["on"]
    assert seen["down"]["words"] == ["<start>", "two", "cats", "<end>"] and not seen["down"]["on"]
    assert seen["down"]["image"] != seen["escape"]["image"]
    # methods of the second image, which has no LRP
    assert seen["start"]["methods"] == METHODS and seen["down"]["methods"] == ["attention", "gradient"]
    assert seen["down"]["legend"].startswith("low") and seen["tap"]["legend"].startswith("negative gradient")
    assert seen["tap"]["chosen"] == 1 and seen["tap"]["opacity"] == "0.5" and seen["tap"]["printed"] == 4 + 3
    assert not any(entry["wide"] for entry in result["log"]) and min(width - 40, 300) <= seen["tap"]["stage"] <= width
