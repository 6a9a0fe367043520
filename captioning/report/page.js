"use strict"
const read = id => JSON.parse(document.getElementById(id).textContent)
const methods = read("methods-data"), entries = read("data")    // an entry is complete, or only {name, caption} until it is loaded
const loaded = []                                               // indices of entries loaded on demand, the oldest first
const LOADED = 12, LISTED = 60
const at = { entry: 0, word: null, region: null, method: null, head: "" }     // what is shown
const PARTS = { image: "image", previous: "earlier words", start: "<start>", rest: "biases, ε" }
const $ = id => document.getElementById(id)
const svgNamespace = "http://www.w3.org/2000/svg"

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

const current = () => entries[at.entry]
const percent = p => p >= 0.001 ? (100 * p).toFixed(1) + "\u00a0%" : p > 0 ? "<\u00a00.1\u00a0%" : "0\u00a0%"
const signed = value => (value > 0 ? "+" : "") + Number(value.toPrecision(3)).toString().replace("-", "−")
const wordColour = r => `var(--${r > 0 ? "red" : "blue"})`
const regionColour = (name, r) => methods[name].signed ? wordColour(r) : "var(--yellow)"
const shownMethods = () => $("side").checked ? Object.keys(current().methods) : [at.method]

// -- the image and its maps ---------------------------------------------------------------------------------------

// the explanation's map of word t: an image, or null for region features
function mapOf(entry, name, t) {
  const method = entry.methods[name]
  return (method.heads && at.head !== "" ? method.heads[at.head] : method.maps)?.[t]
}

function rectangle([x0, y0, x1, y1], attributes) {
  const rect = document.createElementNS(svgNamespace, "rect")
  for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0, ...attributes }))
    rect.setAttribute(name, value)
  return rect
}

function drawing(className, children, label) {
  const svg = document.createElementNS(svgNamespace, "svg")
  for (const [name, value] of Object.entries({ class: className, viewBox: "0 0 1 1", preserveAspectRatio: "none" }))
    svg.setAttribute(name, value)
  if (label) svg.setAttribute("aria-label", label)
  svg.append(...children)
  return svg
}

// the regions of an image as rectangles, coloured by their relevance for word t, the smallest on top
function regionDrawing(entry, name, t) {
  const area = k => (entry.boxes[k][2] - entry.boxes[k][0]) * (entry.boxes[k][3] - entry.boxes[k][1])
  const order = [...entry.boxes.keys()].sort((a, b) => area(b) - area(a))
  return drawing("regions", order.map(k => {
    const r = t === null ? 0 : entry.methods[name].regions[t][k]
    const rect = rectangle(entry.boxes[k], { id: `${name}-region-${k}`, role: "option", "aria-label": `region ${k + 1}`,
                                             "aria-selected": k === at.region, "data-region": k })
    if (r) {
      rect.style.stroke = `rgb(${regionColour(name, r)} / ${Math.abs(r) ** 1.5})`
      rect.style.strokeWidth = `${0.5 + 4.5 * Math.abs(r)}px`
      // a power of the relevance: otherwise regions of medium relevance hide the image
      rect.style.fill = `rgb(${regionColour(name, r)} / ${0.15 * r ** 4})`
    }
    return rect
  }), "regions of the image: ↑ ↓ choose one")
}

// the regions as one tab stop, a list box whose options the arrow keys choose
function interactiveRegions(entry, name) {
  const svg = regionDrawing(entry, name, at.word)
  svg.setAttribute("role", "listbox")
  svg.setAttribute("tabindex", 0)
  for (const rect of svg.children) {
    for (const event of ["mouseenter", "click"]) rect.addEventListener(event, () => openRegion(Number(rect.dataset.region)))
    rect.addEventListener("mouseleave", () => openRegion(null))
  }
  svg.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    event.stopPropagation()
    nextRegion(step)
  })
  return svg
}

function figure(entry, name) {
  const t = at.word, stage = make("div", { className: t === null ? "stage" : "stage on" },
    make("img", { className: "image", src: entry.image, alt: entry.caption }))
  const map = t === null ? null : mapOf(entry, name, t)
  if (map) stage.append(make("img", { className: "heat", src: map, alt: `${name} of “${entry.words[t + 1]}”` }))
  if (entry.boxes) stage.append(interactiveRegions(entry, name))
  if ($("objects").checked) stage.append(drawing("annotated", entry.objects.map(object => {
    const rect = rectangle(object.box, {})
    rect.append(Object.assign(document.createElementNS(svgNamespace, "title"), { textContent: object.name }))
    return rect
  })))
  return make("figure", {}, stage, make("figcaption", {},
    make("p", {}, ...($("side").checked ? [make("b", {}, title(name)), " "] : []), ...legend(entry, name, t)),
    make("p", {}, methods[name].help)))
}

const title = name => name.replaceAll("_", " ")

// the colour scale of a method; with the value of the strongest colour if a word is chosen
function legend(entry, name, t) {
  const [low, high] = methods[name].labels, scale = make("span", { className: "scale" })
  scale.style.setProperty("--gradient", methods[name].legend)
  const strongest = t === null ? "" : `; strongest colour: ${methods[name].signed ? "±" : ""}${entry.methods[name].scales[t]}`
  return [low, scale, high + strongest]
}

// -- the caption ----------------------------------------------------------------------------------------------------

// a bar of the parts of word t as a background: positive parts to the right of zero, negative ones to the left
function splitBar(split, t) {
  const names = Object.keys(PARTS), sum = (u, sign) => names.reduce((s, name) => s + Math.max(0, sign * split[name][u]), 0)
  const steps = [...split.rest.keys()], left = Math.max(...steps.map(u => sum(u, -1)))
  const extent = (left + Math.max(...steps.map(u => sum(u, 1)))) || 1
  const negative = names.filter(name => split[name][t] < 0).reverse(), positive = names.filter(name => split[name][t] > 0)
  let x = (left - sum(t, -1)) / extent
  const stops = [`transparent ${100 * x}%`]
  for (const name of [...negative, ...positive]) {
    const end = x + Math.abs(split[name][t]) / extent
    stops.push(`var(--${name}) ${100 * x}% ${100 * end}%`)
    x = end
  }
  const zero = 100 * left / extent
  return `linear-gradient(var(--ink), var(--ink)) ${zero}% 0 / 2px 100% no-repeat, ` +
         `linear-gradient(90deg, ${stops.join(", ")}, transparent ${100 * x}%)`
}

function showCaption(entry) {
  $("caption").replaceChildren(...entry.words.map((word, i) => {
    const button = make("button", { tabIndex: -1 }, make("span", { className: "word" }, word))
    button.classList.toggle("special", /^<.*>$/.test(word))
    if (i === 0) button.disabled = true     // <start> is read, not predicted
    else if (entry.split) {
      const bar = make("span", { className: "split" })
      bar.style.background = splitBar(entry.split, i - 1)
      button.append(bar)
    }
    if (i && entry.flags[i - 1]) {
      button.classList.add("flagged")
      button.title = "comes from language: the image contributes little"
    }
    for (const event of ["mouseenter", "focus", "click"]) button.addEventListener(event, () => openWord(i - 1))
    return button
  }))
  $("parts").hidden = !entry.split
  if (!entry.split) return
  $("parts").replaceChildren("Parts of each word's logit (LRP):", ...Object.entries(PARTS).flatMap(([name, text]) => {
    const square = make("i")
    square.style.background = `var(--${name})`
    return [make("span", {}, square, text), " "]
  }), ...entry.flags.some(Boolean) ? ["; wavy underline: the word comes from language, hardly from the image"] : [])
}

// colours the words read before the explained word by their relevance for it, and greys the later ones;
// if a region is chosen, colours every word by the region's relevance for that word
function colourWords(entry) {
  const method = entry.methods[at.method], relevance = at.word === null ? null : method.words?.[at.word];
  [...$("caption").children].forEach((button, i) => {
    const ofRegion = at.region !== null && i > 0, r = ofRegion ? method.regions[i - 1][at.region]
      : at.region === null && relevance && i <= at.word ? relevance[i] : 0
    const colour = ofRegion ? regionColour(at.method, r) : wordColour(r)
    button.style.backgroundColor = r ? `rgb(${colour} / ${Math.abs(r) * 0.55})` : ""
    button.classList.toggle("later", at.region === null && at.word !== null && i > at.word + 1)
    button.setAttribute("aria-pressed", at.word !== null && i === at.word + 1)
    button.tabIndex = i === (at.word ?? 0) + 1 ? 0 : -1
  })
}

// -- the table ------------------------------------------------------------------------------------------------------

function table(rows) {
  return make("table", {}, make("tbody", {}, ...rows.map(([className, ...cells]) => make("tr", { className },
    ...cells.map((cell, i) => make("td", { className: i === 1 ? "number" : "" }, cell))))))
}

// the relevance of the chosen region for the words, relative to the strongest region of each word
function regionDetail(entry) {
  const shares = entry.words.slice(1).map((word, t) => [word, entry.methods[at.method].regions[t][at.region]])
  shares.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]))
  return [
    make("h2", {}, `Region ${at.region + 1}, relative to the strongest region of each word`),
    table(shares.slice(0, 6).map(([word, r]) => {
      const share = make("span", { className: "share" })
      share.style.cssText = `width: ${100 * Math.abs(r)}%; background: rgb(${regionColour(at.method, r)})`
      const label = methods[at.method].signed ? methods[at.method].labels[r < 0 ? 0 : 1].replace(" the word", "") : ""
      return ["", word, `${label} ${percent(Math.abs(r))}`, share]
    }))]
}

function splitRows(entry, t) {
  const largest = Math.max(...Object.keys(PARTS).map(name => Math.abs(entry.split[name][t]))) || 1
  return Object.entries(PARTS).map(([name, text]) => {
    const value = entry.split[name][t], part = make("span", { className: "part" })
    part.style.cssText = `width: ${50 * Math.abs(value) / largest}%; background: var(--${name});
                          margin-left: ${value < 0 ? 50 - 50 * Math.abs(value) / largest : 50}%`
    return ["", text, signed(value), part]
  })
}

function detail(entry) {
  if (at.region !== null) return regionDetail(entry)
  if (at.word === null) return [make("h2", {}, "Choose a word of the caption.")]
  const t = at.word, word = entry.words[t + 1], step = entry.steps[t], contrast = entry.contrast
  const rows = step.best.map(([alternative, p]) => [alternative, p, alternative === word])
  if (!rows.some(row => row[2])) rows.push([word, step.p, true])
  const rather = contrast ? `, explained rather than “${contrast.word}”` +
    (contrast.p.length ? ` (probability ${percent(contrast.p[t])})` : "") : ""
  const parts = [make("h2", {}, `“${word}”: probability ${percent(step.p)}${rather}`)]
  if (entry.flags[t]) parts.push(make("p", {}, "This word comes from language: the image contributes little to it."))
  if (entry.split) parts.push(table([...splitRows(entry, t),
    ["", contrast ? "difference of logits" : "logit", signed(entry.logits[t]), ""]]))
  parts.push(table(rows.map(([alternative, p, chosen]) => [chosen ? "chosen-word" : "", alternative, percent(p),
    make("meter", { value: p, title: percent(p) })])))
  if (entry.methods[at.method].words && t > 0) {
    const [low, high] = methods[at.method].word_labels
    parts.push(make("p", { className: "hint" }, `Colours of the earlier words: blue: ${low}, red: ${high}; without <start>.`))
  }
  return parts
}

function about(entry) {
  const list = items => make("ul", {}, ...items.map(item => make("li", {}, item)))
  return [...entry.references.length ? [make("p", {}, "References:"), list(entry.references)] : [],
    ...entry.objects.length ? [make("p", {}, "Annotated objects: ", entry.objects.map(object => object.name).join(", "))] : [],
    list(Object.entries(entry.settings).map(([name, value]) => `${name}: ${value}`))]
}

// -- what is chosen -------------------------------------------------------------------------------------------------

function show() {
  const entry = current()
  colourWords(entry)
  $("detail").replaceChildren(...detail(entry))
  $("main").classList.toggle("side", $("side").checked)
  $("figures").replaceChildren(...shownMethods().map(name => figure(entry, name)))
  for (const button of $("methods").children) button.setAttribute("aria-pressed", button.value === at.method)
  $("head-label").hidden = !(entry.methods.attention?.heads && shownMethods().includes("attention"))
  setHash(entry)
}

// the address of the image and word: #name/word, where ~2 marks a word's second occurrence in the caption
function setHash(entry) {
  if (!location.protocol.startsWith("http") && location.protocol !== "file:") return      // within a notebook
  const words = entry.words.slice(1), word = words[at.word]
  const occurrence = words.slice(0, at.word + 1).filter(other => other === word).length
  history.replaceState(null, "", "#" + encodeURIComponent(entry.name) + (at.word === null ? "" :
    "/" + encodeURIComponent(word) + (occurrence > 1 ? `~${occurrence}` : "")))
}

function openHash() {
  const [name, word] = location.hash.slice(1).split("/").map(decodeURIComponent)
  const i = entries.findIndex(entry => entry.name === name)
  if (i < 0) return openEntry(0)
  const [text, occurrence] = (word || "").split("~")
  openEntry(i, entry => {
    const found = [...entry.words.keys()].filter(j => j && entry.words[j] === text)[(occurrence || 1) - 1]
    return found ? found - 1 : entry.first
  })
}

function openEntry(i, word = entry => entry.first) {
  at.entry = (i + entries.length) % entries.length
  const entry = current()
  $("current").textContent = `${entry.name}: ${entry.caption}`
  $("images").open = false
  if (!entry.methods) return load(at.entry, word)
  at.word = word(entry)
  at.region = null
  if (!(at.method in entry.methods)) at.method = Object.keys(entry.methods)[0]
  $("methods").replaceChildren(...Object.keys(entry.methods).map(name =>
    make("button", { value: name, title: methods[name].help, onclick: () => openMethod(name) }, title(name))))
  const heads = entry.methods.attention?.heads
  at.head = ""
  $("head").replaceChildren(make("option", { value: "" }, "mean"),
    ...(heads || []).map((_, m) => make("option", { value: m }, `${m + 1}`)))
  $("objects-label").hidden = !entry.objects.length
  for (const key of document.querySelectorAll(".region-key")) key.hidden = !entry.boxes
  $("about").hidden = !entry.references.length && !Object.keys(entry.settings).length
  $("about-text").replaceChildren(...about(entry))
  showCaption(entry)
  show()
}

// loads an image's entry.html, which sends its entry; only the last LOADED ones are kept
function load(i, word) {
  const frame = make("iframe", { src: `${encodeURIComponent(entries[i].name)}/entry.html`, sandbox: "allow-scripts", hidden: true })
  const receive = event => {
    if (event.source !== frame.contentWindow) return
    removeEventListener("message", receive)
    frame.remove()
    if (!entries[i].methods) loaded.push(i)
    entries[i] = { ...JSON.parse(event.data), name: entries[i].name }     // its folder may have been renamed
    if (loaded.length > LOADED) {
      const [oldest] = loaded.splice(loaded.findIndex(j => j !== at.entry), 1), { name, caption } = entries[oldest]
      entries[oldest] = { name, caption }
    }
    if (at.entry === i) openEntry(i, word)
  }
  addEventListener("message", receive)
  frame.onload = () => setTimeout(() => {      // browsers do not report that a frame's file is missing
    if (at.entry !== i || current().methods) return
    for (const id of ["figures", "caption", "parts"]) $(id).replaceChildren()
    $("detail").replaceChildren(make("h2", {}, `${frame.getAttribute("src")} cannot be loaded.`))
  }, 1000)
  document.body.append(frame)
}

function openWord(t) {
  const word = t === null ? null : Math.min(Math.max(t, 0), current().words.length - 2)
  if (word === at.word || !current().methods) return
  at.word = word
  at.region = null
  show()
}

// chooses a word by keyboard; the focus follows
function stepWord(t) {
  openWord(t)
  $("caption").children[at.word + 1].focus()
}

function openRegion(k) {
  if (k === at.region) return
  at.region = k
  for (const svg of document.querySelectorAll(".regions")) for (const rect of svg.children) {
    const chosen = Number(rect.dataset.region) === k
    rect.setAttribute("aria-selected", chosen)
    if (chosen) svg.setAttribute("aria-activedescendant", rect.id)
  }
  colourWords(current())
  $("detail").replaceChildren(...detail(current()))
}

// chooses the next region, in order of relevance for the word
function nextRegion(step = 1) {
  const entry = current(), t = at.word
  if (!entry.boxes) return
  const order = [...entry.boxes.keys()], regions = entry.methods[at.method].regions
  if (t !== null) order.sort((a, b) => Math.abs(regions[t][b]) - Math.abs(regions[t][a]))
  openRegion(order[(order.indexOf(at.region) + step + order.length) % order.length])
}

function openMethod(name) {
  at.method = name
  show()
}

function nextMethod() {
  const names = Object.keys(current().methods)
  openMethod(names[(names.indexOf(at.method) + 1) % names.length])
}

// -- the list of images -----------------------------------------------------------------------------------------------

function showList() {
  const wanted = $("search").value.toLowerCase().split(/\s+/)
  const found = [...entries.keys()].filter(i =>
    wanted.every(part => `${entries[i].name} ${entries[i].caption}`.toLowerCase().includes(part)))
  const start = $("search").value ? 0 : Math.max(0, Math.min(at.entry - LISTED / 2, found.length - LISTED))
  const shown = found.slice(start, start + LISTED)
  $("matches").textContent = shown.length < found.length
    ? `${found.length} images, of which ${shown.length} are listed: search for others` : `${found.length} images`
  $("thumbnails").replaceChildren(...shown.map(i => {
    const { name, caption, image } = entries[i]
    const button = make("button", { onclick: () => openEntry(i) }, make("img", { alt: "", loading: "lazy",
      src: loaded.includes(i) || !image ? `${encodeURIComponent(name)}/thumbnail.webp` : image }), `${name}: ${caption}`)
    if (i === at.entry) button.setAttribute("aria-current", true)
    return button
  }))
}

// -- saving and printing ------------------------------------------------------------------------------------------------

// saves the figures that are shown, below their caption, as a PNG
async function savePng() {
  const entry = current(), width = 640, pad = 16, names = shownMethods()
  const images = await Promise.all([entry.image, ...names.map(name => at.word === null ? null : mapOf(entry, name, at.word))]
    .map(async src => {
      const image = src ? make("img", { src }) : null
      await image?.decode()
      return image
    }))
  const height = Math.round(width * images[0].naturalHeight / images[0].naturalWidth)
  const canvas = make("canvas", { width: names.length * (width + pad) + pad, height: height + 96 })
  const draw = canvas.getContext("2d"), opacity = Number($("opacity").value)
  Object.assign(draw, { fillStyle: "#fff", textBaseline: "top" })
  draw.fillRect(0, 0, canvas.width, canvas.height)
  draw.fillStyle = "#000"
  let x = pad
  entry.words.slice(1, -1).forEach((word, t) => {
    draw.font = `${t === at.word ? "bold " : ""}20px sans-serif`
    draw.fillText(word, x, 14)
    x += draw.measureText(word + " ").width
  })
  names.forEach((name, m) => {
    const x = pad + m * (width + pad), map = images[m + 1]
    draw.filter = map ? `grayscale(${opacity}) contrast(${1 - 0.35 * opacity}) brightness(${1 + 0.2 * opacity})` : "none"
    draw.drawImage(images[0], x, 48, width, height)
    draw.filter = "none"
    draw.globalAlpha = opacity
    if (map) draw.drawImage(map, x, 48, width, height)
    draw.globalAlpha = 1
    draw.font = "16px sans-serif"
    draw.fillText(`${title(name)}: ${legend(entry, name, at.word).map(part => part.textContent ?? part).join(" – ")
      .replace(" –  – ", " – ")}`, x, height + 62)
  })
  const blob = await new Promise(resolve => canvas.toBlob(resolve))
  const link = make("a", { href: URL.createObjectURL(blob),
    download: `${entry.name}_${at.word === null ? "image" : entry.words[at.word + 1].replace(/\W/g, "")}_${at.method}.png` })
  link.click()
  URL.revokeObjectURL(link.href)
  return blob
}

// in print: every image that is loaded, with the maps of all words, by the chosen method
addEventListener("beforeprint", () => $("paper").replaceChildren(...entries.filter(entry => entry.methods).map(entry => {
  const name = at.method in entry.methods ? at.method : Object.keys(entry.methods)[0]
  return make("article", {}, make("h2", {}, `${entry.caption}  [${title(name)}]`),
    make("div", { className: "words" }, ...entry.words.slice(1).map((word, t) => {
      const map = mapOf(entry, name, t)
      const stage = make("div", { className: "stage" }, make("img", { src: entry.grey, alt: "" }),
        map ? make("img", { className: "heat", src: map, alt: "" }) : regionDrawing(entry, name, t))
      const scale = `${methods[name].signed ? "±" : ""}${entry.methods[name].scales[t]}`
      return make("figure", {}, stage, make("figcaption", {}, `${word}: ${percent(entry.steps[t].p)}, ${scale}`))
    })),
    make("p", { className: "hint" }, ...legend(entry, name, null), "; below each map: the word's probability, and the value of the strongest colour"))
})))
addEventListener("afterprint", () => $("paper").replaceChildren())

// -- events -------------------------------------------------------------------------------------------------------------

$("previous").onclick = () => openEntry(at.entry - 1)
$("next").onclick = () => openEntry(at.entry + 1)
$("opacity").oninput = event => document.documentElement.style.setProperty("--opacity", event.target.value)
$("head").onchange = event => { at.head = event.target.value; show() }
$("side").onchange = $("objects").onchange = show
$("save").onclick = savePng
$("search").oninput = showList
$("images").ontoggle = () => { if ($("images").open) { showList(); $("search").focus() } }
for (const id of ["images", "previous", "next"]) $(id).hidden = entries.length < 2
addEventListener("hashchange", openHash)

document.addEventListener("keydown", event => {
  const typing = event.target.matches?.("select, input:not([type=checkbox])")
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return
  if (!current().methods && !["ArrowDown", "ArrowUp"].includes(event.key)) return
  const act = {
    ArrowRight: () => stepWord(at.word === null ? 0 : at.word + 1),
    ArrowLeft: () => stepWord(at.word === null ? 0 : at.word - 1),
    ArrowDown: () => openEntry(at.entry + 1),
    ArrowUp: () => openEntry(at.entry - 1),
    m: nextMethod, M: nextMethod,
    r: () => nextRegion(), R: () => nextRegion(),
    Escape: () => { $("images").open = false; openRegion(null); openWord(null) },
  }[event.key]
  if (!act) return
  event.preventDefault()
  act()
})

openHash()
