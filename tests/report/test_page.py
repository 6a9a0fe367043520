"""The page in a browser: words respond, images change, nothing is fetched and no error occurs."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from made_up import random_explanation, random_image

from captioning.explanation.methods import METHODS
from captioning.report.page import ENTRY, page_entry, write_entry, write_page

SHOWN = ["lrp", "attention"]
BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: install it")
# functions for the scripts below, and what they report
OBSERVE = """
<script>
const log = [], errors = []
let finished = ""
addEventListener("error", event => errors.push(String(event.message)))
console.error = (...parts) => errors.push(parts.join(" "))
const key = (name, target = document.activeElement) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }))
const word = i => document.querySelectorAll("#caption button")[i]
async function until(condition) {
  while (!condition()) await new Promise(resolve => setTimeout(resolve, 20))
}
function note(action, more = {}) {
  const words = [...document.querySelectorAll("#caption button")]
  log.push({ action, words: words.map(b => b.querySelector(".word").textContent),
    chosen: words.findIndex(b => b.ariaPressed === "true"),
    focus: words.indexOf(document.activeElement),
    colours: words.map(b => b.style.backgroundColor),
    splits: words.map(b => b.querySelector(".split")?.style.background),
    flagged: words.map(b => b.classList.contains("flagged")),
    tabbable: words.filter(b => b.tabIndex === 0).length,
    heats: [...document.querySelectorAll(".heat")].map(i => i.src),
    alts: [...document.images].map(i => i.alt), image: document.querySelector(".image")?.src,
    methods: [...$("methods").children].map(b => b.value), detail: $("detail").innerText,
    captions: [...document.querySelectorAll("figcaption")].map(c => c.innerText),
    parts: $("parts").hidden ? "" : $("parts").innerText,
    about: $("about-text").textContent, hash: decodeURIComponent(location.hash),
    heads: $("head-label").hidden ? null : $("head").options.length,
    stage: document.querySelector(".stage")?.clientWidth,
    wide: document.documentElement.scrollWidth > innerWidth,
    memory: entries.filter(e => e.methods).length, ...more })
}
addEventListener("load", async () => {
  try { await walk() } catch (error) { errors.push(String(error.stack)) }
  finished = JSON.stringify({ log, errors })
})
</script>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def browse(browser, path, walk, *, address="", **window):
    """{action: what the page shows} after each `note` of the script `walk`."""
    tested = path.with_name(f"test_{path.name}")
    script = f"{OBSERVE}<script>async function walk() {{ {walk} }}</script>"
    page = path.read_text(encoding="utf-8").replace("<header>", script + "<header>", 1)
    tested.write_text(page, encoding="utf-8")
    result = json.loads(browser.result(tested.as_uri() + address, "finished", **window))
    assert result["errors"] == []
    return {entry["action"]: entry for entry in result["log"]}


def explanation(words, methods=SHOWN, seed=0, **fields):
    """Of random numbers but for those that the tests expect."""
    explained = random_explanation(words, methods, seed, **fields)
    if "lrp" in methods:
        T = len(words)
        explained.methods["lrp"].words[1:3, :3] = [[-90, -1, 0], [2, 2, -1]]
        explained.split = {"image": np.arange(T) % (T - 1) + 1.0, "start": np.full(T, -3.0),
                           "rest": np.full(T, 0.5), "previous": np.arange(T) * 1.0}
        explained.flags = np.arange(T) == 1
        explained.presence = np.where(explained.flags, 0.2, np.nan)
    return explained


def write_folders(folder, explanations):
    """Writes what the page shows of each {name: explanation} -> {folder: caption}."""
    captions = {}
    for i, (name, explained) in enumerate(explanations.items()):
        (folder / name).mkdir()
        image = random_image((80 + 200 * (i % 2), 60), i)
        explained = replace(explained, name=name, image=image)
        write_entry(folder / name, page_entry(explained), image)
        captions[folder / name] = explained.caption
    return captions


CAPTION = ["a", "dog", "</script><b>", "a", "<end>"]


@pytest.fixture
def index(tmp_path):
    """The page of two images, of which the second has no LRP."""
    first = explanation(CAPTION, references=["a brown dog", "two cats"], objects=["dog"],
                        object_boxes=np.array([[10, 10, 50, 40]]),
                        settings={"checkpoint": "best.pth", "decoding": "greedy"})
    second = explanation(["two", "cats", "<end>"], ["grad_cam", "gradient"], 1, contrast="dog",
                         contrast_probabilities=np.array([0.125, 0.5, 0]))
    folders = write_folders(tmp_path, {"image 0": first, "image_1#": second})
    write_page(tmp_path / "index.html", folders)
    return tmp_path / "index.html"


def test_nothing_is_fetched_and_words_are_escaped(index):
    text = index.read_text(encoding="utf-8")
    fetching = (r"https?://(?!www\.w3\.org/2000/svg)", r"src\s*=\s*[\"'](?!data:)", r"href\s*=",
                "@import", r"url\(")
    assert not re.search("|".join(fetching), text)
    assert text.count("</script>") == 2
    # few images: the page is one file
    entries = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [entry["name"] for entry in entries] == ["image 0", "image_1#"]
    assert "maps" in entries[0]["methods"]["lrp"] and not re.search("@[A-Z]+@", text)
    assert all(method.description.endswith(".") for method in METHODS.values())


WALK = """
  note("start")
  const point = i => word(i).dispatchEvent(new MouseEvent("mouseenter"))
  point(2); note("hover")
  document.querySelector("#methods [value=attention]").focus()
  document.querySelector("#methods [value=attention]").click(); note("attention")
  key("ArrowRight"); note("right")
  $("head").value = "1"; $("head").dispatchEvent(new Event("change")); note("head")
  $("head").value = ""; $("head").dispatchEvent(new Event("change"))
  $("methods").children[1].focus(); key("m"); note("m")
  key("ArrowLeft"); note("left")
  $("side").click(); note("side"); $("side").click()
  $("objects").click()
  note("objects", { boxes: document.querySelectorAll(".annotated rect").length })
  key("Escape"); word(4).focus(); note("focus")
  const blob = await savePng(); note("png", { size: blob.size })
  word(2).click(); point(4); note("pinned")
  key("Escape"); point(4); note("released")
  key("Escape"); note("escape")
  key("n"); note("down")
  word(1).click()
  $("opacity").value = 0.5
  $("opacity").dispatchEvent(new Event("input"))
  note("tap", { opacity: getComputedStyle(document.documentElement).getPropertyValue("--opacity") })
  $("images").open = true; showList()
  $("search").value = "DOG image"; $("search").dispatchEvent(new Event("input"))
  note("search", { found: [...$("thumbnails").children].map(b => b.textContent) })
  $("search").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" })); note("enter")
"""


@BROWSER
@pytest.mark.parametrize("width", [360, 900, 1600])
def test_in_a_browser(browser, index, width):
    seen = browse(browser, index, WALK, width=width)
    start, hover = seen["start"], seen["hover"]
    assert start["words"] == ["<start>", *CAPTION]
    assert start["chosen"] == 3         # "a" is a stop word
    assert start["flagged"] == [False, False, True, False, False, False]
    assert "probably not there" in start["parts"]
    assert start["splits"][0] is None
    assert all("--image" in bar and "--start" in bar for bar in start["splits"][1:])
    assert start["alts"][0] == "a dog </script><b> a" and start["tabbable"] == 1
    assert hover["chosen"] == 2 and "“dog”: probability 25.0\u00a0%" in hover["detail"]
    for text in ("cat", "previous words", "+2", "−3", "logit", "+6.5",
                 "probability that it is in the image is 20.0\u00a0%"):
        assert text in hover["detail"], text
    for text in ("opposes the word", "supports the word; strongest colour: ±", "Layer-wise"):
        assert text in hover["captions"][0]
    assert "dog" in hover["hash"] and "two cats" in hover["about"]
    assert "checkpoint: best.pth" in hover["about"]
    assert not hover["colours"][0]      # <start>
    assert "--blue" in hover["colours"][1] and "0.55" in hover["colours"][1]
    assert not any(hover["colours"][2:])
    # arrow keys still select words after a method was chosen, and the focus follows
    assert seen["attention"]["heats"] != hover["heats"] and seen["attention"]["heads"] == 4
    assert seen["right"]["chosen"] == seen["right"]["focus"] == 3
    assert seen["head"]["heats"] != seen["right"]["heats"] and "low" in seen["right"]["captions"][0]
    assert seen["m"]["chosen"] == 3 and seen["m"]["heads"] is None
    assert seen["left"]["chosen"] == seen["left"]["focus"] == 2
    assert seen["left"]["heats"] == hover["heats"]
    assert seen["side"]["heats"] == [*hover["heats"], *seen["attention"]["heats"]]
    assert "attention" in seen["side"]["captions"][1] and seen["objects"]["boxes"] == 1
    assert seen["focus"]["chosen"] == 4 and seen["focus"]["hash"] == "#image 0/a~2"
    assert seen["png"]["size"] > 5000
    # a clicked word stays while the mouse passes others, until Esc
    assert seen["pinned"]["chosen"] == 2 and seen["released"]["chosen"] == 4
    assert seen["escape"]["chosen"] == -1 and not seen["escape"]["heats"]
    assert seen["escape"]["hash"] == "#image 0"
    # the second image has other methods
    down = seen["down"]
    assert start["methods"] == SHOWN and down["methods"] == ["grad_cam", "gradient"]
    assert down["words"] == ["<start>", "two", "cats", "<end>"] and down["image"] != start["image"]
    assert down["chosen"] == 2          # the longest word
    assert not any(down["splits"]) and not down["parts"]
    assert "rather than “dog” (probability 50.0\u00a0%)" in down["detail"]
    assert "blue: negative gradient" in down["detail"]
    assert any("--" in colour for colour in down["colours"])
    assert seen["tap"]["chosen"] == 1 and seen["tap"]["opacity"] == "0.5"
    assert seen["search"]["found"] == ["image 0: a dog </script><b> a"]
    assert seen["enter"]["words"] == start["words"] and seen["enter"]["chosen"] == 3
    assert not any(entry["wide"] for entry in seen.values())
    assert min(width - 40, 300) <= seen["tap"]["stage"] <= width


@BROWSER
def test_the_address_leads_to_a_word(browser, index):
    for address, chosen in (("#image%200/a~2", 4), ("#image%200/dog", 2), ("#image_1%23/two", 1),
                            ("#nowhere/x", 3)):
        assert browse(browser, index, 'note("start")', address=address)["start"]["chosen"] == chosen


CONTRAST = """
  const channel = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  const numbers = text => text.match(/[\\d.]+/g).map(Number)
  const light = rgb => [0.2126, 0.7152, 0.0722].reduce(
    (sum, weight, i) => sum + weight * channel(rgb[i] / 255), 0)
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i])
  function background(element) {
    if (!element) return [255, 255, 255]
    const own = numbers(getComputedStyle(element).backgroundColor)
    return over(own, background(element.parentElement))
  }
  const poor = []
  for (const name of ["lrp", "attention"]) for (const t of [0, 1, 2, 3, 4]) {
    choose({ method: name }); openWord(t)
    const texts = "button:not(:disabled) .word, p, td, h2, label, button, summary, figcaption"
    for (const element of document.querySelectorAll(texts)) {
      if (!element.innerText.trim() || element.closest("[hidden]")) continue
      const pair = [numbers(getComputedStyle(element).color), background(element)].map(light)
      const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)
      if (ratio < 4.5) poor.push(`${element.tagName} ${element.innerText}`)
    }
  }
  note("end", { poor, paper: getComputedStyle(document.body).backgroundColor })
"""


@BROWSER
def test_text_is_legible_in_both_themes(browser, index):
    light, dark = (browse(browser, index, CONTRAST, dark=dark)["end"] for dark in (False, True))
    assert light["poor"] == dark["poor"] == [] and light["paper"] != dark["paper"]


@BROWSER
def test_regions_are_one_tab_stop(browser, tmp_path):
    explained = explanation(["a", "dog", "<end>"], ["lrp"], boxes=np.array(
        [[0, 0, 40, 60], [20, 20, 50, 50], [0, 0, 5, 5]]))
    explained.methods["lrp"].regions = np.tile([0.2, -1.0, 0.5], (3, 1))
    write_page(tmp_path / "index.html", write_folders(tmp_path, {"a": explained}))
    seen = browse(browser, tmp_path / "index.html", """
      const svg = document.querySelector(".regions")
      const state = () => ({ stops: document.querySelectorAll(".stage [tabindex]").length,
        chosen: svg.getAttribute("aria-activedescendant"), role: svg.getAttribute("role"),
        options: svg.querySelectorAll("[role=option]").length,
        strokes: [...svg.children].map(r => [r.dataset.region, r.style.stroke]) })
      note("start", state())
      svg.focus(); key("ArrowDown"); note("first", state())
      key("ArrowDown"); note("second", state())
      key("r"); note("r", state())
    """)
    assert seen["start"]["stops"] == 1 and seen["start"]["role"] == "listbox"
    assert seen["start"]["options"] == 3
    # relevance 0.2, −1 and 0.5; opaque for the strongest
    strokes = dict(seen["start"]["strokes"])
    assert "--red" in strokes["0"] and "--blue" in strokes["1"] and "--red" in strokes["2"]
    assert "/ 1)" in strokes["1"]
    assert float(strokes["0"].split("/")[1][:-1]) == pytest.approx(0.2 ** 1.5, abs=0.01)
    chosen = [seen[name]["chosen"] for name in ("first", "second", "r")]
    assert chosen == ["lrp-region-1", "lrp-region-2", "lrp-region-0"]
    assert "Region 2, relative" in seen["first"]["detail"]
    assert "--blue" in seen["first"]["colours"][1]
    assert "opposes" in seen["first"]["detail"] and "supports" in seen["second"]["detail"]


@BROWSER
def test_many_images_are_loaded_on_demand(browser, tmp_path):
    names = [f"photo {i}" for i in range(40)]
    content = explanation(["a", "dog", "<end>"])
    folders = write_folders(tmp_path, dict.fromkeys(names, content))
    write_page(tmp_path / "index.html", folders)
    (tmp_path / names[39] / ENTRY).unlink()
    assert (tmp_path / "index.html").stat().st_size < 50_000
    seen = browse(browser, tmp_path / "index.html", """
      await until(() => current().methods); note("start")
      for (let i = 0; i < 20; i++) { key("n"); await until(() => current().methods) }
      note("walked")
      const pictures = $("thumbnails").getElementsByTagName("img")
      const seen = () => [...pictures].filter(i => i.naturalWidth).length
      $("images").open = true; showList(); await until(() => seen() >= 5)
      note("list", { thumbnails: seen() })
      const blob = await savePng(); note("png", { size: blob.size })
      openEntry(39); await until(() => $("detail").innerText.includes("photo%2039"))
      note("missing")
      key("p"); await until(() => current().methods); note("up")
    """, address="#photo%207/dog")
    assert seen["start"]["hash"] == "#photo 7/dog" and seen["start"]["memory"] == 1
    assert seen["start"]["chosen"] == 2
    assert seen["walked"]["hash"].startswith("#photo 27/") and seen["walked"]["memory"] == 12
    assert seen["missing"]["detail"] == "photo%2039/entry.html cannot be loaded."
    assert not seen["missing"]["heats"]
    assert seen["up"]["hash"].startswith("#photo 38/") and seen["up"]["heats"]
    assert seen["up"]["memory"] == 12
    assert seen["list"]["thumbnails"] >= 5 and seen["png"]["size"] > 5000
