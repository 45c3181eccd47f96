"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("specs");
  const labels = read("labels");
  const views = [];
  const locked = new Set();
  let pointed = null;

  // Text and grid take the colour of the page, so that charts are readable in a light and in a dark scheme.
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const ink = "currentColor";
  const config = {
    background: "transparent",
    font: getComputedStyle(document.body).fontFamily,
    axis: { labelColor: ink, titleColor: ink, gridColor: ink, gridOpacity: 0.1, tickColor: ink, tickOpacity: 0.35, domainColor: ink },
    legend: { labelColor: ink, titleColor: ink, symbolStrokeColor: ink },
    header: { labelColor: ink, titleColor: ink },
  };

  const chosen = () => {
    const shown = new Set(locked);
    if (pointed !== null) shown.add(pointed);
    return [...shown].sort((a, b) => a - b);
  };

  function paint() {
    const shown = chosen();
    const names = shown.map((i) => labels[i]);
    for (const view of views) view.signal("highlight", names).runAsync();
    for (const element of document.querySelectorAll("[data-method]"))
      element.classList.toggle("faded", shown.length > 0 && !shown.includes(Number(element.dataset.method)));
    for (const chip of document.querySelectorAll(".chip")) {
      const place = Number(chip.dataset.chip);
      chip.setAttribute("aria-pressed", String(locked.has(place)));
      chip.classList.toggle("faded", locked.size > 0 && !shown.includes(place));
    }
    document.querySelector(".clear").hidden = locked.size === 0;
  }

  for (const chip of document.querySelectorAll(".chip")) {
    const place = Number(chip.dataset.chip);
    const point = (value) => () => { pointed = value; paint(); };
    chip.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") point(place)(); });
    chip.addEventListener("pointerleave", point(null));
    chip.addEventListener("focus", () => { if (chip.matches(":focus-visible")) point(place)(); });
    chip.addEventListener("blur", point(null));
    chip.addEventListener("click", () => {
      if (!locked.delete(place)) locked.add(place);
      else pointed = null;
      paint();
    });
  }
  const clear = () => { locked.clear(); pointed = null; paint(); };
  document.querySelector(".clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });

  // A faceted chart has no width of its own: as many columns as fit, each as wide as that leaves room for.
  function fit(spec, holder) {
    if (!spec.facet) return;
    const room = Math.max(holder.clientWidth, 220);
    const inner = spec.spec;
    const square = inner.width === inner.height;
    const beside = square ? 150 : 60; // the axis on the left, and the legend of a heat map
    const gap = 20;
    const cells = new Set(spec.data.values.map((row) => row[spec.facet.field])).size;
    const columns = Math.max(1, Math.min(spec.columns, cells, Math.floor((room - beside) / (inner.width * 0.9 + gap))));
    const share = Math.floor((room - beside) / columns - gap);
    spec.columns = columns;
    inner.width = Math.max(120, Math.min(share, square ? 230 : 560));
    if (square) inner.height = inner.width;
  }

  async function draw(holder) {
    const spec = structuredClone(specs[Number(holder.dataset.spec)]);
    fit(spec, holder);
    const { renderer, file } = spec.usermeta;
    delete spec.usermeta;
    for (const [part, style] of Object.entries(config))
      spec.config[part] = typeof style === "object" ? { ...spec.config[part], ...style } : style;
    try {
      const result = await vegaEmbed(holder, spec, {
        renderer,
        actions: { export: true, source: false, compiled: false, editor: false },
        downloadFileName: file,
        tooltip: { theme: dark.matches ? "dark" : "light" },
      });
      result.view.signal("highlight", chosen().map((i) => labels[i])).run();
      return result;
    } catch (error) {
      console.error(`chart ${holder.dataset.spec}: ${error}`);
      holder.textContent = `This chart could not be drawn: ${error.message}`;
      holder.classList.add("problem");
      return null;
    }
  }

  let drawing = Promise.resolve();
  let results = [];
  async function drawAll() {
    views.length = 0;
    for (const result of results) result.finalize();
    results = [];
    for (const holder of document.querySelectorAll(".chart")) {
      const result = await draw(holder);
      if (result) {
        results.push(result);
        views.push(result.view);
      }
    }
    document.documentElement.dataset.drawn = String(views.length);
  }
  const redraw = () => { drawing = drawing.then(drawAll); };
  let width = window.innerWidth;
  let timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 250);
  });
  dark.addEventListener("change", redraw);
  window.robustlens = { views };
  redraw();
})();
