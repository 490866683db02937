// What is wider than its column: a formula is set smaller, to 65 % at the least, and a table on a phone becomes a list. What is
// wider still scrolls, and its edge fades.
const SMALLEST = 0.65;
const PHONE = 576; // pixels

const wider = box => box.scrollWidth > box.clientWidth + 1;

function fitFormula(box) {
  const formula = box.querySelector("mjx-container[display=true]");
  if (!formula) return;
  formula.style.fontSize = "";
  const ratio = formula.clientWidth / formula.scrollWidth;
  if (ratio < 1) formula.style.fontSize = `${100 * Math.max(SMALLEST, 0.98 * ratio)}%`;
  formula.classList.toggle("scrolls", wider(formula));
}

function fitTable(table) {
  table.classList.remove("stacked", "scrolls");
  if (wider(table) && window.innerWidth <= PHONE) table.classList.add("stacked");
  table.classList.toggle("scrolls", wider(table));
}

function nameColumns(table) {
  const names = [...table.querySelectorAll("thead :is(th, td)")].map(cell => cell.textContent.trim());
  for (const row of table.querySelectorAll("tbody tr"))
    [...row.cells].forEach((cell, i) => i && names[i] && (cell.dataset.column = names[i]));
}

function watch() {
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

document.addEventListener("DOMContentLoaded", watch);
