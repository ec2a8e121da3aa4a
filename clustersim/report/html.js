"use strict";
// Draws the figures of the page: in the colours of the theme, with what is chosen, zoomed by buttons too.
(function () {
  const told = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const drawn = new Map();
  // Of A4 within its margins, in CSS pixels.
  const PAPER_WIDTH = 680;
  let printing = false;

  function onPaper() { return printing || paper.matches; }
  function colours() { return told.themes[dark.matches && !onPaper() ? "dark" : "light"]; }

  // Names of colours, which begin with a sign that no text has, become colours.
  function painted(value, by) {
    if (typeof value === "string") return value.charCodeAt(0) === 1 ? by[value.slice(1)] : value;
    if (Array.isArray(value)) return value.map(one => painted(one, by));
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, painted(one, by)]));
    }
    return value;
  }

  // Rows of a heat map from one byte a cell: 0 to `steps` are 0 to `full`, 255 is not known.
  function rows(packed) {
    const bytes = Uint8Array.from(atob(packed.bytes), one => one.charCodeAt(0));
    const found = [];
    for (let r = 0; r < packed.rows; r++) {
      found.push(Array.from(bytes.subarray(r * packed.columns, (r + 1) * packed.columns),
        one => one === 255 ? null : one * packed.full / packed.steps));
    }
    return found;
  }

  function unpacked(trace) {
    if (!trace.packed) return trace;
    const { packed, labels, ...rest } = trace;
    const z = rows(packed);
    return { ...rest, z, text: z.map((row, r) => Array(row.length).fill(labels[r])) };
  }

  function chosen(figure, trace) {
    return Object.entries(trace.meta || {}).every(([what, one]) => !figure.chosen[what] || figure.chosen[what] === one);
  }

  function layoutOf(figure) {
    const by = colours(), layout = painted(figure.layout, by);
    const axes = Object.keys(layout).filter(key => /^[xy]axis/.test(key));
    for (const key of axes) {
      layout[key] = { gridcolor: by.grid, linecolor: by.rule, zerolinecolor: by.rule, tickcolor: by.rule,
        automargin: true, ...layout[key] };
    }
    const wide = onPaper() ? { width: PAPER_WIDTH, autosize: false } : { autosize: true };
    return { paper_bgcolor: by.paper, plot_bgcolor: by.paper, hovermode: "closest", dragmode: "zoom",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 13, color: by.ink },
      hoverlabel: { bgcolor: by.panel, bordercolor: by.rule, font: { color: by.ink }, align: "left", namelength: -1 },
      ...wide, ...layout };
  }

  const config = { responsive: true, displaylogo: false, doubleClick: "reset",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };

  function draw(figure, keep) {
    const place = document.getElementById(figure.name + "-plot");
    const by = colours(), layout = layoutOf(figure);
    const traces = figure.data.filter(trace => chosen(figure, trace)).map(trace => painted(unpacked(trace), by));
    if (keep && place.layout) {
      for (const key of Object.keys(layout).filter(name => /^[xy]axis/.test(name))) {
        const was = place.layout[key];
        if (was && was.range && was.autorange === false) layout[key] = { ...layout[key], range: was.range.slice(), autorange: false };
      }
    }
    drawn.set(figure.name, place);
    return Plotly.react(place, traces, layout, config);
  }

  function drawAll() { for (const figure of told.figures) draw(figure, true); }

  function zoom(place, how) {
    const axis = place._fullLayout.xaxis;
    const [from, to] = axis.range.map(Number), width = to - from, middle = (from + to) / 2;
    const ranges = { in: [middle - width / 4, middle + width / 4], out: [middle - width, middle + width],
      left: [from - width / 4, to - width / 4], right: [from + width / 4, to + width / 4] };
    if (how === "all") {
      const whole = told.figures.find(figure => figure.name + "-plot" === place.id).layout.xaxis.range;
      return Plotly.relayout(place, whole ? { "xaxis.range": whole.slice() } : { "xaxis.autorange": true });
    }
    return Plotly.relayout(place, { "xaxis.range": ranges[how] });
  }

  document.addEventListener("change", event => {
    const input = event.target;
    const figure = told.figures.find(one => one.name === input.dataset.figure);
    if (!figure) return;
    figure.chosen[input.dataset.what] = input.value;
    draw(figure, false);
  });
  document.addEventListener("click", event => {
    const button = event.target.closest("button[data-zoom]");
    if (button && drawn.has(button.dataset.figure)) zoom(drawn.get(button.dataset.figure), button.dataset.zoom);
  });
  dark.addEventListener("change", drawAll);
  paper.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });

  // One after another, so that the page can be read and moved meanwhile.
  function next(at) {
    if (at >= told.figures.length) {
      document.documentElement.dataset.drawn = "all";
      return;
    }
    draw(told.figures[at], true);
    setTimeout(() => next(at + 1), 0);
  }
  for (const figure of told.figures) figure.chosen = { ...figure.first };
  next(0);
})();
