"use strict";

// Plots: SVG, so that they print sharply and take their colours from the style sheet.
for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  vegaEmbed(figure.querySelector(".plot"), spec, { actions: false, renderer: "svg", defaultStyle: false, tooltip: { theme: "custom" } })
    .then(() => figure.setAttribute("data-drawn", ""))
    .catch((error) => {
      figure.querySelector(".plot").textContent = "This plot could not be drawn: " + error.message;
      console.error(error);
    });
}

// The table of trials: sorted by a heading's button, filtered by words and by status.
const table = document.getElementById("trials-table");
if (table) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const words = document.getElementById("trials-words");
  const status = document.getElementById("trials-status");
  const shown = document.getElementById("trials-shown");

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" ? null : cell.classList.contains("number") ? Number(text) : text; // a plan's digits are no number
  };
  const compare = (left, right) =>
    typeof left === "number" && typeof right === "number" ? left - right : String(left).localeCompare(String(right));

  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!event.target.closest("button")) return;
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = heading.cellIndex;
    rows.sort((one, other) => {
      const [left, right] = [value(one, column), value(other, column)];
      if (left === null || right === null) return (left === null) - (right === null); // empty cells last
      return descending ? compare(right, left) : compare(left, right);
    });
    body.append(...rows);
  });

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(wanted.every((word) => text.includes(word)) && (!status.value || row.dataset.status === status.value));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} trials`;
  };
  words.addEventListener("input", filter);
  status.addEventListener("change", filter);
}

// Print everything: what is folded, and every trial; afterwards all is as it was.
const folded = "details:not([open])", filtered = "tbody tr[hidden]";
const shownToPrint = new Set();
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll(`${folded}, ${filtered}`)) shownToPrint.add(part);
  for (const part of shownToPrint) part.tagName === "DETAILS" ? (part.open = true) : (part.hidden = false);
});
addEventListener("afterprint", () => {
  for (const part of shownToPrint) part.tagName === "DETAILS" ? (part.open = false) : (part.hidden = true);
  shownToPrint.clear();
});
