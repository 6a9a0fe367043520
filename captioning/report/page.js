"use strict"
// an entry is complete, or only {name, caption} until it is loaded
const entries = JSON.parse(document.getElementById("data").textContent)
const loaded = []           // indices of entries loaded on demand, the oldest first
const LOADED = 12, LISTED = 60
// what is shown; a pinned word stays while the mouse passes others
const at = { entry: 0, word: null, pinned: false, region: null, method: null, head: "" }
const PARTS = { image: "image", previous: "previous words", start: "<start>", rest: "rest" }
// words that need an explanation
const SPECIAL = {
  "<end>": "<end> is the end of the caption. Its image part is often the largest of all.",
  "<unk>": "<unk> stands for any word that is not in the model's vocabulary." }
const $ = id => document.getElementById(id)

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

function makeSvg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const attribute of Object.entries(attributes)) element.setAttribute(...attribute)
  element.append(...children)
  return element
}

const current = () => entries[at.entry]
const method = () => current().methods[at.method]
const title = name => name.replaceAll("_", " ")
const colour = (r, isSigned = true) => `var(--${!isSigned ? "yellow" : r > 0 ? "red" : "blue"})`
const shownMethods = () => $("side").checked ? Object.keys(current().methods) : [at.method]

const percent = p => (p >= 0.001 ? (100 * p).toFixed(1) : p > 0 ? "<\u00a00.1" : "0") + "\u00a0%"
const withSign = value =>
  (value > 0 ? "+" : "") + Number(value.toPrecision(3)).toString().replace("-", "−")

// -- the image and its maps -----------------------------------------------------------------------

// an SVG over the image, whose sides are 1, and rectangles in it
const drawing = (attributes, children) =>
  makeSvg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", ...attributes }, ...children)
const rectangle = ([x0, y0, x1, y1], attributes, ...children) =>
  makeSvg("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, ...attributes }, ...children)

// the regions as rectangles, coloured by their relevance for the word, the smallest on top;
// one tab stop, a list box whose options the arrow keys choose
function regionDrawing(name) {
  const { boxes, methods } = current(), kind = methods[name]
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0)
  const order = [...boxes.keys()].sort((a, b) => area(boxes[b]) - area(boxes[a]))
  const rects = order.map(k => {
    const r = at.word === null ? 0 : kind.regions[at.word][k], rgb = colour(r, kind.signed)
    // powers of the relevance: otherwise regions of medium relevance hide the image
    const style = r ? `stroke: rgb(${rgb} / ${Math.abs(r) ** 1.5});
      stroke-width: ${0.5 + 4.5 * Math.abs(r)}px; fill: rgb(${rgb} / ${0.15 * r ** 4})` : ""
    const rect = rectangle(boxes[k], { id: `${name}-region-${k}`, role: "option", style,
      "aria-label": `region ${k + 1}`, "aria-selected": k === at.region, "data-region": k })
    for (const event of ["mouseenter", "click"]) rect.addEventListener(event, () => openRegion(k))
    rect.addEventListener("mouseleave", () => openRegion(null))
    return rect
  })
  const svg = drawing({ class: "regions", role: "listbox", tabindex: 0,
    "aria-label": "regions of the image: ↑ ↓ choose one" }, rects)
  svg.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    event.stopPropagation()
    nextRegion(step)
  })
  return svg
}

function figure(name) {
  const entry = current(), t = at.word, { heads, maps } = entry.methods[name]
  const map = (heads[at.head] ?? maps)?.[t]         // the address of an image; none for regions
  const stage = make("div", { className: t === null ? "stage" : "stage on" },
    make("img", { className: "image", src: entry.image, alt: entry.caption }))
  if (map) {
    const alt = `${name} of “${entry.words[t + 1]}”`
    stage.append(make("img", { className: "heat", src: map, alt }))
  }
  if (entry.boxes) stage.append(regionDrawing(name))
  if ($("objects").checked) {
    stage.append(drawing({ class: "annotated" }, entry.objects.map(object =>
      rectangle(object.box, {}, makeSvg("title", {}, object.name)))))
  }
  const heading = $("side").checked ? [make("b", {}, title(name)), " "] : []
  return make("figure", {}, stage, make("figcaption", {},
    make("p", {}, ...heading, ...legend(name, t)), make("p", {}, entry.methods[name].help)))
}

// the colour scale of a method; with the value of the strongest colour if a word is chosen
function legend(name, t) {
  const { labels, legend, signed, scales } = current().methods[name]
  const strongest = t === null ? "" : `; strongest colour: ${signed ? "±" : ""}${scales[t]}`
  const scale = make("span", { className: "scale", style: `--gradient: ${legend}` })
  return [labels[0], scale, labels[1] + strongest]
}

// -- the caption ----------------------------------------------------------------------------------

// the parts of word t as the background of a bar, on one axis for all words: positive parts to the
// right of zero, negative ones to the left; cut off where those of <end>, often large, exceed it
function splitBar(split, t) {
  const names = Object.keys(PARTS)
  const sum = (u, sign) =>
    names.reduce((total, name) => total + Math.max(0, sign * split[name][u]), 0)
  const steps = [...split.rest.keys()].filter(u => current().words[u + 1] !== "<end>")
  const left = Math.max(0, ...steps.map(u => sum(u, -1)))
  const extent = (left + Math.max(0, ...steps.map(u => sum(u, 1)))) || 1
  const negative = names.filter(name => split[name][t] < 0).reverse()
  const positive = names.filter(name => split[name][t] > 0)
  let x = (left - sum(t, -1)) / extent
  const stops = [`transparent ${100 * x}%`]
  for (const name of [...negative, ...positive]) {
    const end = x + Math.abs(split[name][t]) / extent
    stops.push(`var(--${name}) ${100 * x}% ${100 * end}%`)
    x = end
  }
  const zero = `linear-gradient(var(--ink), var(--ink)) ${100 * left / extent}% 0 / 2px 100%`
  return `${zero} no-repeat, linear-gradient(90deg, ${stops.join(", ")}, transparent ${100 * x}%)`
}

function estimate(probability) {
  return `the estimated probability that it is in the image is ${percent(probability)}`
}

function showCaption() {
  const { words, split, flags, presence } = current()
  $("caption").replaceChildren(...words.map((word, i) => {
    const button = make("button", { tabIndex: -1 }, make("span", { className: "word" }, word))
    button.classList.toggle("special", /^<.*>$/.test(word))
    if (i === 0) button.disabled = true     // <start> is read, not predicted
    else if (split) button.append(
      make("span", { className: "split", style: `background: ${splitBar(split, i - 1)}` }))
    button.classList.toggle("flagged", Boolean(flags[i - 1]))
    if (typeof presence[i - 1] === "number") button.title = estimate(presence[i - 1])
    button.onmouseenter = button.onfocus = () => at.pinned || openWord(i - 1)
    button.onclick = () => { openWord(i - 1); pin(true) }
    return button
  }))
  $("parts").hidden = !split
  const squares = Object.entries(PARTS).flatMap(([name, text]) =>
    [make("span", {}, make("i", { style: `background: var(--${name})` }), text), " "])
  $("parts").replaceChildren("Bars: parts of each word's logit (LRP); those left of the line " +
    "oppose the word:", ...squares, flags.some(Boolean)
    ? "(wavy underline: the object that the word names is probably not there)" : "")
}

// colours the words read before the explained word by their relevance for it, and greys the later
// ones; if a region is chosen, colours every word by the region's relevance for that word
function colourWords() {
  const t = at.word, { words, regions, signed } = method(), ofRegion = at.region !== null
  for (const [i, button] of [...$("caption").children].entries()) {
    const values = ofRegion ? regions[i - 1] : i <= t ? words?.[t] : null
    const r = values?.[ofRegion ? at.region : i]
    const rgb = colour(r, !ofRegion || signed)
    button.style.backgroundColor = r ? `rgb(${rgb} / ${Math.abs(r) * 0.55})` : ""
    button.classList.toggle("later", !ofRegion && t !== null && i > t + 1)
    button.setAttribute("aria-pressed", t !== null && i === t + 1)
    button.tabIndex = i === (t ?? 0) + 1 ? 0 : -1
  }
}

// -- the table ------------------------------------------------------------------------------------

function table(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([className, ...cells]) =>
    make("tr", { className }, ...cells.map((cell, i) =>
      make("td", { className: i === 1 ? "number" : "" }, cell))))))
}

// the relevance of the chosen region for the words, relative to the strongest region of each word
function regionDetail() {
  const kind = method()
  const rows = current().words.slice(1).map((word, t) => [word, kind.regions[t][at.region]])
  rows.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]))
  return [
    make("h2", {}, `Region ${at.region + 1}, relative to the strongest region of each word`),
    table(rows.slice(0, 6).map(([word, r]) => {
      const label = kind.signed ? kind.labels[r < 0 ? 0 : 1].replace(" the word", "") : ""
      const style = `width: ${100 * Math.abs(r)}%; background: rgb(${colour(r, kind.signed)})`
      return ["", word, `${label} ${percent(Math.abs(r))}`,
        make("span", { className: "share", style })]
    }))]
}

function splitRows(split, t) {
  const largest = Math.max(...Object.keys(PARTS).map(name => Math.abs(split[name][t]))) || 1
  return Object.entries(PARTS).map(([name, text]) => {
    const value = split[name][t], width = 50 * Math.abs(value) / largest
    const style = `background: var(--${name}); width: ${width}%;
      margin-left: ${value < 0 ? 50 - width : 50}%`
    return ["", text, withSign(value), make("span", { className: "part", style })]
  })
}

// where the word comes from, in one sentence
function origin(split, t) {
  const [name] = Object.keys(PARTS).sort((a, b) => split[b][t] - split[a][t])
  const image = split.image[t] < 0 ? " The image opposes it, as it does some correct words." : ""
  return `Most support comes from: ${PARTS[name]}.${image}`
}

// whether the word can be trusted, as far as the model's estimates say
function trust({ flags, presence }, t) {
  if (typeof presence[t] === "number")
    return `${flags[t] ? "Doubtful: this" : "This"} word names an object; ${estimate(presence[t])}.`
  return presence.length ? "No estimate: only words that name objects have one. Others can be " +
    "wrong, too." : "Unknown: no estimates (see evaluation.py --calibrate)."
}

function detail() {
  if (at.region !== null) return regionDetail()
  if (at.word === null) return [make("h2", {}, "Choose a word of the caption.")]
  const entry = current(), t = at.word, word = entry.words[t + 1], { p, best } = entry.steps[t]
  const contrast = entry.contrast

  let heading = `“${word}”: probability ${percent(p)}`
  if (contrast) heading += `, explained rather than “${contrast.word}”`
  if (contrast?.p.length) heading += ` (probability ${percent(contrast.p[t])})`
  const parts = [make("h2", {}, heading)]
  if (SPECIAL[word]) parts.push(make("p", {}, SPECIAL[word]))
  if (entry.split) {
    const total = ["", contrast ? "difference of logits" : "logit", withSign(entry.logits[t]), ""]
    parts.push(make("h3", {}, "Where does it come from?"),
      make("p", {}, origin(entry.split, t)), table([...splitRows(entry.split, t), total]),
      make("p", { className: "hint" }, "<start>: expected of every caption; rest: of biases and ε"),
      make("h3", {}, "Can I trust it?"), make("p", {}, trust(entry, t)))
  }

  const rows = best.some(([other]) => other === word) ? best : [...best, [word, p]]
  parts.push(make("h3", {}, "What else could the model have said here?"))
  parts.push(table(rows.map(([other, p]) => [other === word ? "chosen-word" : "", other, percent(p),
    make("meter", { value: p, title: percent(p) })])))
  if (method().words && t > 0) {
    const [low, high] = method().word_labels
    parts.push(make("p", { className: "hint" },
      `Colours of the previous words: blue: ${low}, red: ${high}; without <start>.`))
  }
  return parts
}

function about({ references, objects, settings }) {
  const list = items => make("ul", {}, ...items.map(item => make("li", {}, item)))
  const names = objects.map(object => object.name).join(", ")
  return [
    ...references.length ? [make("p", {}, "References:"), list(references)] : [],
    ...names ? [make("p", {}, `Annotated objects: ${names}`)] : [],
    list(Object.entries(settings).map(([name, value]) => `${name}: ${value}`))]
}

// -- what is chosen -------------------------------------------------------------------------------

function choose(changes) {
  Object.assign(at, changes)
  show()
}

function show() {
  const names = shownMethods()
  colourWords()
  $("detail").replaceChildren(...detail())
  $("main").classList.toggle("side", $("side").checked)
  $("figures").replaceChildren(...names.map(figure))
  for (const button of $("methods").children)
    button.setAttribute("aria-pressed", button.value === at.method)
  $("head-label").hidden = !names.some(name => current().methods[name].heads.length)
  setHash()
}

// the address of the image and word: #name/word; ~2 marks a word's second occurrence
function setHash() {
  if (!/^(http|file)/.test(location.protocol)) return      // within a notebook
  const words = current().words.slice(1), word = words[at.word]
  const occurrence = words.slice(0, at.word + 1).filter(other => other === word).length
  const ending = word && `/${encodeURIComponent(word)}` + (occurrence > 1 ? `~${occurrence}` : "")
  history.replaceState(null, "", `#${encodeURIComponent(current().name)}${ending ?? ""}`)
}

function openHash() {
  const [name, word] = location.hash.slice(1).split("/").map(decodeURIComponent)
  const i = entries.findIndex(entry => entry.name === name)
  if (i < 0) return openEntry(0)
  const [text, occurrence] = (word || "").split("~")
  openEntry(i, ({ words, first }) => {
    const found = [...words.keys()].filter(j => j && words[j] === text)
    return (found[(occurrence || 1) - 1] ?? first + 1) - 1
  })
}

function openEntry(i, word = entry => entry.first) {
  at.entry = (i + entries.length) % entries.length
  const entry = current()
  $("current").textContent = `Image ${at.entry + 1} of ${entries.length}: ${entry.name}`
  document.title = `${entry.name}: ${entry.caption}`
  $("images").open = false
  if (!entry.methods) return load(at.entry, word)
  const names = Object.keys(entry.methods)
  Object.assign(at, { word: word(entry), region: null, head: "" })
  pin(false)
  if (!names.includes(at.method)) at.method = names[0]
  $("methods").replaceChildren(...names.map(name => make("button", { value: name,
    title: entry.methods[name].help, onclick: () => choose({ method: name }) }, title(name))))
  const heads = Math.max(...names.map(name => entry.methods[name].heads.length))
  $("head").replaceChildren(make("option", { value: "" }, "mean"),
    ...[...Array(heads).keys()].map(m => make("option", { value: m }, `${m + 1}`)))
  $("objects-label").hidden = !entry.objects.length
  $("side-label").hidden = names.length < 2
  for (const [kind, isShown] of [["regions", entry.boxes], ["pixels", !entry.boxes]])
    for (const element of document.querySelectorAll(`.of-${kind}`)) element.hidden = !isShown
  $("about").hidden = !entry.references.length && !Object.keys(entry.settings).length
  $("about-text").replaceChildren(...about(entry))
  showCaption()
  show()
}

// loads an image's entry.html, which sends its entry; only the last LOADED ones are kept
function load(i, word) {
  const src = `${encodeURIComponent(entries[i].name)}/entry.html`
  const frame = make("iframe", { src, sandbox: "allow-scripts", hidden: true })
  const receive = event => {
    if (event.source !== frame.contentWindow) return
    removeEventListener("message", receive)
    frame.remove()
    if (!entries[i].methods) loaded.push(i)
    // the name of the folder, which may have been renamed
    entries[i] = { ...JSON.parse(event.data), name: entries[i].name }
    if (loaded.length > LOADED) {
      const [oldest] = loaded.splice(loaded.findIndex(j => j !== at.entry), 1)
      const { name, caption } = entries[oldest]
      entries[oldest] = { name, caption }
    }
    if (at.entry === i) openEntry(i, word)
  }
  addEventListener("message", receive)
  frame.onload = () => setTimeout(() => {   // browsers do not report that a frame's file is missing
    if (at.entry !== i || current().methods) return
    for (const id of ["figures", "caption", "parts"]) $(id).replaceChildren()
    $("detail").replaceChildren(make("h2", {}, `${src} cannot be loaded.`))
  }, 1000)
  document.body.append(frame)
}

function openWord(t) {
  const word = t === null ? null : Math.min(Math.max(t, 0), current().words.length - 2)
  if (word !== at.word && current().methods) choose({ word, region: null })
}

function pin(pinned) {
  at.pinned = pinned
  $("caption").classList.toggle("pinned", pinned)
}

// chooses a word by keyboard; the focus follows
function stepWord(step) {
  openWord(at.word === null ? 0 : at.word + step)
  pin(true)
  $("caption").children[at.word + 1].focus()
}

function openRegion(k) {
  if (k === at.region) return
  at.region = k
  for (const rect of document.querySelectorAll(".regions rect")) {
    const chosen = Number(rect.dataset.region) === k
    rect.setAttribute("aria-selected", chosen)
    if (chosen) rect.parentNode.setAttribute("aria-activedescendant", rect.id)
  }
  colourWords()
  $("detail").replaceChildren(...detail())
}

// chooses the next region, in order of relevance for the word
function nextRegion(step = 1) {
  if (!current().boxes) return
  const order = [...current().boxes.keys()], values = method().regions[at.word]
  if (values) order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]))
  openRegion(order[(order.indexOf(at.region) + step + order.length) % order.length])
}

// -- the list of images ---------------------------------------------------------------------------

function showList() {
  const wanted = $("search").value.toLowerCase().split(/\s+/)
  const found = [...entries.keys()].filter(i =>
    wanted.every(part => `${entries[i].name} ${entries[i].caption}`.toLowerCase().includes(part)))
  const middle = Math.min(at.entry - LISTED / 2, found.length - LISTED)
  const start = $("search").value ? 0 : Math.max(0, middle)
  const shown = found.slice(start, start + LISTED), omitted = shown.length < found.length
  $("matches").textContent = `${found.length} images` +
    (omitted ? `, of which ${shown.length} are listed: search for others` : "")
  $("thumbnails").replaceChildren(...shown.map(i => {
    const { name, caption, image } = entries[i]
    const src = loaded.includes(i) || !image ? `${encodeURIComponent(name)}/thumbnail.webp` : image
    const button = make("button", { onclick: () => openEntry(i) },
      make("img", { alt: "", loading: "lazy", src }), `${name}: ${caption}`)
    if (i === at.entry) button.setAttribute("aria-current", true)
    return button
  }))
}

// saves the figures that are shown, below the caption, as a PNG
async function savePng() {
  const entry = current(), names = shownMethods(), width = 640, pad = 16
  const word = at.word === null ? "" : entry.words[at.word + 1]
  const first = document.querySelector(".image")
  await first.decode()
  const height = Math.round(width * first.naturalHeight / first.naturalWidth)
  const canvas = make("canvas", { width: names.length * (width + pad) + pad, height: height + 96 })
  const draw = canvas.getContext("2d")
  draw.fillStyle = "#fff"
  draw.fillRect(0, 0, canvas.width, canvas.height)
  Object.assign(draw, { fillStyle: "#000", font: "18px sans-serif" })
  draw.fillText(word ? `“${word}” in “${entry.caption}”` : entry.caption, pad, 32)
  for (const [m, name] of names.entries()) {
    const x = pad + m * (width + pad), [low, , high] = legend(name, at.word)
    // the photograph, grey below a map, and the map
    for (const image of $("figures").children[m].querySelectorAll("img")) {
      await image.decode()
      const { filter, opacity } = getComputedStyle(image)
      Object.assign(draw, { filter, globalAlpha: opacity })
      draw.drawImage(image, x, 48, width, height)
    }
    Object.assign(draw, { filter: "none", globalAlpha: 1 })
    draw.fillText(`${title(name)}: ${low} – ${high}`, x, height + 76)
  }
  const blob = await new Promise(resolve => canvas.toBlob(resolve))
  const link = make("a", { href: URL.createObjectURL(blob),
    download: `${entry.name}_${word.replace(/\W/g, "") || "image"}_${at.method}.png` })
  link.click()
  URL.revokeObjectURL(link.href)
  return blob
}

// -- events ---------------------------------------------------------------------------------------

$("previous").onclick = () => openEntry(at.entry - 1)
$("next").onclick = () => openEntry(at.entry + 1)
$("opacity").oninput = event =>
  document.documentElement.style.setProperty("--opacity", event.target.value)
$("head").onchange = event => choose({ head: event.target.value })
$("side").onchange = $("objects").onchange = show
$("save").onclick = savePng
$("search").oninput = showList
$("images").ontoggle = () => { if ($("images").open) { showList(); $("search").focus() } }
$("search").onkeydown = event => {
  if (event.key === "Enter") $("thumbnails").firstChild?.click()
}
for (const id of ["images", "steps", "image-keys"]) $(id).hidden = entries.length < 2
addEventListener("hashchange", openHash)

const KEYS = {
  arrowright: () => stepWord(1),
  arrowleft: () => stepWord(-1),
  n: () => openEntry(at.entry + 1),
  p: () => openEntry(at.entry - 1),
  m: () => {
    const names = Object.keys(current().methods)
    choose({ method: names[(names.indexOf(at.method) + 1) % names.length] })
  },
  r: () => nextRegion(),
  escape: () => {
    $("images").open = false
    if (at.pinned) return pin(false)
    openRegion(null)
    openWord(null)
  },
}

document.addEventListener("keydown", event => {
  const typing = event.target.matches?.("select, input:not([type=checkbox])")
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return
  const key = event.key.toLowerCase()
  if (!KEYS[key] || !current().methods && !["n", "p"].includes(key)) return
  event.preventDefault()
  KEYS[key]()
})

openHash()
