// Sorts a table by a click on a heading, and hides the rows that a search does not find. Needs no network.
"use strict";
const collator = new Intl.Collator(undefined, { numeric: true });

function value(row, column) {
  const cell = row.cells[column];
  return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim();
}

function sort(button) {
  const heading = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
  const column = Number(button.dataset.column);
  const up = heading.getAttribute("aria-sort") === "descending" || (heading.ariaSort === null && button.dataset.first === "up");
  const rows = Array.from(body.rows, row => [value(row, column), row]);
  rows.sort(([a], [b]) => (typeof a === "number" ? a - b : collator.compare(a, b)) * (up ? 1 : -1));
  for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows.map(([, row]) => row));
}

function search(box) {
  const words = box.value.toLowerCase().normalize("NFC").split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of document.getElementById(box.getAttribute("aria-controls")).tBodies[0].rows) {
    row.hidden = !words.every(word => row.dataset.words.includes(word));
    shown += !row.hidden;
  }
  document.getElementById("found").textContent = words.length ? `${shown} found` : "";
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
for (const box of document.querySelectorAll("input[type=search]")) {
  box.addEventListener("input", () => search(box));
  search(box);
}
