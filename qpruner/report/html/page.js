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

// Unfold all folded parts for printing, and fold them again afterwards.
const unfolded = new Set();
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) unfolded.add(part);
  for (const part of unfolded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of unfolded) part.open = false;
  unfolded.clear();
});
