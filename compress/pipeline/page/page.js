// The script of report.html: draws the plots in the page's colours, opens what was clicked, and prepares the page for paper.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const touch = matchMedia("(hover: none)");
  const root = document.documentElement;
  const NARROW = 420; // CSS pixels
  const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const PAPER = { width: 680, height: 330 }; // CSS pixels: between the margins of A4 and Letter, two plots a page

  // A colour of the style sheet, "var(--ink)", as the colour that plotly understands.
  function colour(name) {
    const value = getComputedStyle(root).getPropertyValue(name).trim();
    const both = value.match(/^light-dark\((#\w+), (#\w+)\)$/);
    return both ? both[dark.matches && !root.classList.contains("on-paper") ? 2 : 1] : value;
  }

  function coloured(value) {
    if (typeof value === "string") return value.replace(/^var\((--[\w-]+)\)$/, (_, name) => colour(name));
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, coloured(part)]));
  }

  const plots = [...document.querySelectorAll("script[data-plot]")].map((script) => ({
    place: document.getElementById(script.dataset.plot), figure: JSON.parse(script.textContent),
  }));

  function draw({ place, figure }) {
    const { data, layout } = coloured(figure);
    if (touch.matches) layout.dragmode = false; // a finger that moves over a plot scrolls the page
    const costs = data.flatMap((trace) => trace.x ?? []);
    if (place.clientWidth < NARROW && layout.xaxis.type === "log" && Math.max(...costs) > 30 * Math.min(...costs)) {
      layout.xaxis.dtick = 1; // 100k, 1M, 10M: the labels between them would touch
    }
    if (root.classList.contains("on-paper")) Object.assign(layout, PAPER);
    return Plotly.react(place, data, layout, { responsive: true, displaylogo: false, modeBarButtons: BUTTONS,
      ...(touch.matches && { displayModeBar: false }) });
  }

  // Show the element with this id: open what it lies in, scroll to it, and give it the keyboard.
  function show(id) {
    const target = id && document.getElementById(id);
    if (!target) return;
    for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    document.querySelectorAll(".found").forEach((element) => element.classList.remove("found"));
    target.classList.add("found");
    target.scrollIntoView({ block: "start" });
    (target.querySelector("summary") ?? target).focus({ preventScroll: true });
  }

  // On paper all details are open, the colours are those of the day, and plots are as wide as the sheet.
  let opened = [];
  function onPaper(now) {
    if (root.classList.contains("on-paper") === now) return;
    root.classList.toggle("on-paper", now);
    if (now) opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((box) => { box.open = now; });
    plots.forEach(draw);
    if (!now) plots.forEach(({ place }) => Plotly.Plots.resize(place));
  }

  for (const plot of plots) {
    draw(plot);
    plot.place.on("plotly_click", (event) => show(event.points[0].customdata?.[0]));
    const area = () => plot.place.querySelector(".nsewdrag");
    plot.place.on("plotly_hover", (event) => { area().style.cursor = event.points[0].customdata ? "pointer" : ""; });
    plot.place.on("plotly_unhover", () => { area().style.cursor = ""; });
  }
  dark.addEventListener("change", () => plots.forEach(draw));
  paper.addEventListener("change", () => onPaper(paper.matches));
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(paper.matches));
  addEventListener("hashchange", () => show(location.hash.slice(1)));
  show(location.hash.slice(1));
})();
