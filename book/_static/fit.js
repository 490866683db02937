// What is wider than its column: a formula is set smaller, to 65 % at the least, and a tap shows it in the size of the text; a table or an output in columns a little smaller, and a
// table on a phone becomes a list. What is wider still scrolls, and its edge fades. A figure that is shown much smaller than it was
// drawn opens at full size on a tap.
const SMALLEST = 0.65;
const SMALLEST_OUTPUT = 0.8;
const PHONE = 576; // pixels

const wider = box => box.scrollWidth > box.clientWidth + 1;

// at its end, what scrolls has nothing more to show, and its edge is clear
const markEnd = box => box.classList.toggle("at-end", box.scrollLeft + box.clientWidth >= box.scrollWidth - 1);

function markScrolls(box, scrolls) {
  box.classList.toggle("scrolls", scrolls);
  if (scrolls) box.tabIndex = 0; // the arrow keys scroll what has the focus
  else box.removeAttribute("tabindex");
  markEnd(box);
}

const drawnSize = new WeakMap(); // formula -> its size in per cent, as MathJax sets it

function sizeOf(formula) {
  if (!drawnSize.has(formula)) drawnSize.set(formula, parseFloat(formula.style.fontSize) || 100);
  return drawnSize.get(formula);
}

function fitFormula(box) {
  const formula = box.querySelector("mjx-container[display=true]");
  if (!formula) return;
  const size = sizeOf(formula);
  formula.style.fontSize = `${size}%`;
  const ratio = formula.clientWidth / formula.scrollWidth;
  box.classList.toggle("set-smaller", ratio < 1);
  const small = ratio < 1 && !box.classList.contains("full-size");
  if (small) formula.style.fontSize = `${Math.max(100 * SMALLEST, 0.98 * ratio * size)}%`;
  box.title = small ? "Tap for the size of the text" : "";
  offerSize(box, ratio < 1, small);
  markScrolls(formula, wider(formula));
}

// what a tap does, for the keyboard: a button that shows while it has the focus, in formulas that were set smaller alone
function offerSize(box, isWide, small) {
  const words = small ? "Enlarge formula" : "Shrink formula";
  let button = box.querySelector(":scope > button.enlarge");
  if (!isWide) return button?.remove();
  if (!button) box.append((button = Object.assign(document.createElement("button"), { type: "button", className: "enlarge" })));
  if (button.textContent !== words) button.textContent = words; // each change is looked at again
}

// a formula that was set smaller has the size of the text after a tap, or its button, and scrolls; a second one takes that back
function watchTaps() {
  document.addEventListener("click", ({ target }) => {
    const box = target.closest("div.math.set-smaller");
    if (!box || target.closest("a") || String(getSelection())) return;
    box.classList.toggle("full-size");
    fitFormula(box);
  });
}

function fitInline(formula) {
  const line = formula.closest("p, li, dd, td, figcaption, h1, h2, h3, h4, div");
  if (!line || !line.clientWidth) return;
  const size = sizeOf(formula), box = formula.parentElement;
  formula.style.fontSize = `${size}%`;
  box.classList.remove("scrolls");
  const isWide = () => formula.getBoundingClientRect().width > line.clientWidth + 1; // a column is as wide as its formula, rounded
  if (!isWide()) return;
  const ratio = line.clientWidth / formula.getBoundingClientRect().width;
  formula.style.fontSize = `${size * Math.max(SMALLEST, 0.96 * ratio)}%`;
  markScrolls(box, isWide());
}

// a formula in a line can be wider than a phone; all of them are looked at again when the screen turns
function watchInline() {
  const article = document.querySelector(".bd-article");
  const all = root => [...root.querySelectorAll("span.math > mjx-container:not([display])")];
  let width = window.innerWidth;
  if (!article) return;
  new MutationObserver(changes => {
    const boxes = new Set(changes.map(change => change.target.closest("span.math")));
    boxes.forEach(box => box && all(box.parentElement).forEach(formula => box.contains(formula) && fitInline(formula)));
  }).observe(article, { childList: true, subtree: true });
  addEventListener("resize", () => {
    if (window.innerWidth !== width) all(article).forEach(fitInline);
    width = window.innerWidth;
  });
}

function fitTable(table) {
  table.classList.remove("stacked", "small", "scrolls");
  if (wider(table)) table.classList.add(window.innerWidth <= PHONE ? "stacked" : "small");
  markScrolls(table, wider(table));
}

// lines with gaps inside, one below the other, are a table
const isInColumns = text => text.split("\n").filter(line => /\S {2,}\S/.test(line)).length > 1;

function fitOutput(box) {
  box.style.fontSize = "";
  const { fontSize, paddingLeft } = getComputedStyle(box), margins = 2 * parseFloat(paddingLeft);
  const ratio = (box.clientWidth - margins) / (box.scrollWidth - margins);
  if (ratio < 1) box.style.fontSize = `${parseFloat(fontSize) * Math.max(SMALLEST_OUTPUT, 0.99 * ratio)}px`;
  markScrolls(box, wider(box));
}

// a heading with a formula, in words
const GREEK = { alpha: "α", beta: "β", epsilon: "ε", eta: "η", lambda: "λ", mu: "μ", phi: "φ", sigma: "σ", theta: "θ" };
const LOW = "₀₁₂₃₄₅₆₇₈₉";
const inWords = text => text.replace(/\\[()]/g, "").replace(/\\([a-zA-Z]+) ?/g, (_, name) => GREEK[name] || name + " ")
  .replace(/_(\d)/g, (_, digit) => LOW[digit]).replace(/_t\b/g, "ₜ").replace(/_/g, "").trim();

function nameColumns(table) {
  const names = [...table.querySelectorAll("thead :is(th, td)")].map(cell => inWords(cell.textContent));
  for (const row of table.querySelectorAll("tbody tr"))
    [...row.cells].forEach((cell, i) => {
      cell.classList.toggle("empty", !cell.textContent.trim() && !cell.querySelector("img"));
      if (i && names[i]) cell.dataset.column = names[i];
    });
}

// ---------------------------------------------------------------- figures

// of the size that a figure was drawn for: its letters, of 12 pixels there, keep 11 on a desktop and 9 on a phone
const readable = () => (window.innerWidth <= PHONE ? 0.74 : 0.9);

function openFigure(image) {
  const dialog = document.createElement("dialog"), frame = document.createElement("div");
  const close = Object.assign(document.createElement("button"), { type: "button", className: "btn btn-primary", textContent: "Close" });
  const large = image.cloneNode();
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", image.alt);
  large.style.width = `${image.getAttribute("width")}px`;
  frame.append(large);
  dialog.append(close, frame);
  close.addEventListener("click", () => dialog.close());
  large.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function fitFigure(images) {
  const box = images[0].parentElement, shown = images.find(image => image.clientWidth);
  const button = box.querySelector(":scope > button.enlarge");
  const small = shown && shown.clientWidth < readable() * shown.getAttribute("width");
  if (Boolean(small) === Boolean(button) || !shown) return;
  if (button) button.remove();
  box.classList.toggle("enlarges", Boolean(small));
  if (!small) return;
  const made = Object.assign(document.createElement("button"), { type: "button", className: "enlarge", textContent: "Enlarge" });
  const open = () => openFigure(images.find(image => image.clientWidth));
  made.addEventListener("click", open);
  for (const image of images) image.onclick = () => image.closest(".enlarges") && open();
  box.append(made);
}

function watchFigures() {
  const boxes = new Map(); // box -> its twins
  for (const image of document.querySelectorAll(".bd-article img[width]:is(.on-light, .on-dark, .on-both)")) {
    if (image.closest("a, .sd-card")) continue;
    boxes.set(image.parentElement, [...(boxes.get(image.parentElement) || []), image]);
  }
  const sizes = new ResizeObserver(entries => entries.forEach(({ target }) => fitFigure(boxes.get(target))));
  boxes.forEach((_, box) => sizes.observe(box));
}

function watchOutputs() {
  const sizes = new ResizeObserver(entries => entries.forEach(({ target }) => fitOutput(target.firstElementChild)));
  for (const box of document.querySelectorAll("div.cell_output div.output pre")) {
    if (!isInColumns(box.textContent)) continue;
    box.classList.add("columns");
    sizes.observe(box.parentElement);
  }
}

function watchEnds() {
  const look = ({ target }) => { if (target.classList?.contains("scrolls")) markEnd(target); };
  document.addEventListener("scroll", look, { capture: true, passive: true }); // this event does not rise
}

// ---------------------------------------------------------------- all

function watch() {
  watchFigures();
  watchOutputs();
  watchInline();
  watchEnds();
  watchTaps();
  const fit = box => (box.matches("table") ? fitTable(box) : fitFormula(box));
  const typeset = new MutationObserver(changes => {
    const boxes = new Set(changes.map(change => change.target.closest("div.math, table")));
    boxes.forEach(box => box && fit(box));
  });
  const widths = new Map(); // a box is fitted again when the width of its column changes
  const columns = new ResizeObserver(entries => {
    for (const { target, contentRect } of entries) {
      if (widths.get(target) === contentRect.width) continue;
      widths.set(target, contentRect.width);
      for (const box of target.children) if (box.matches("div.math, table")) fit(box);
    }
  });
  for (const box of document.querySelectorAll("div.math, .bd-article table")) {
    if (box.matches("table")) nameColumns(box);
    typeset.observe(box, { childList: true, subtree: true });
    columns.observe(box.parentElement);
    fit(box);
  }
}

// Paper is white: a dark page is printed as a light one.
const page = document.documentElement;
let worn = null;
addEventListener("beforeprint", () => { worn = page.dataset.theme; page.dataset.theme = "light"; });
addEventListener("afterprint", () => { page.dataset.theme = worn; });

document.addEventListener("DOMContentLoaded", watch);
