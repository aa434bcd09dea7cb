"use strict";
(() => {
  let page = JSON.parse(document.getElementById("data").textContent);
  const state = { x: "round", xscale: "linear", yscale: "linear", barscale: "log" };
  const chosen = {}; // plot -> the run whose clients it shows
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const titles = { round: "round", bytes: "bytes so far, both ways", seconds: "seconds so far" };
  const colors = {
    light: ["#0b5cad", "#c2410c", "#15803d", "#a21caf", "#8a5a00", "#0e7490", "#b91c1c", "#4b5563"],
    dark: ["#7db8f5", "#fb9a6b", "#6fd28f", "#e19bf0", "#e0b94f", "#62cfe4", "#f58b8b", "#b3bcc7"],
  };

  function theme(width) {
    const ink = dark.matches ? "#e7eaee" : "#1b1f24";
    const soft = dark.matches ? "#a3adb8" : "#57606a";
    const line = dark.matches ? "#38414b" : "#d5dae0";
    const font = 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif';
    return {
      background: null,
      font,
      view: { stroke: null },
      axis: {
        labelColor: soft, titleColor: ink, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8, labelOverlap: true,
      },
      legend: {
        orient: "bottom", columns: Math.max(1, Math.floor(width / 130)), labelColor: ink, titleColor: soft,
        labelFontSize: 12, labelLimit: 220, symbolLimit: 60, symbolSize: 80, titleFontWeight: "normal",
      },
      range: { category: dark.matches ? colors.dark : colors.light },
      text: { color: ink },
      line: { invalid: "break-paths-show-path-domains" },
    };
  }

  function axis(field, log) {
    if (field !== "bytes") return { tickMinStep: field === "round" ? 1 : undefined, format: "~s" };
    return bytes(log);
  }

  function bytes(log) {
    return { format: "~s", labelExpr: "datum.label ? datum.label + 'B' : ''", tickCount: 5, labelFlush: log };
  }

  function positive(field) {
    return { filter: `datum[${JSON.stringify(field)}] > 0` };
  }

  function spec(name, width) {
    const plot = page.plots[name];
    const made = JSON.parse(JSON.stringify(plot.spec));
    let rows = plot.rows;
    if (plot.kind === "clients") {
      const run = chosen[name] ?? page.runs[0];
      const of = (each) => each.rows.filter((row) => row.run === run);
      rows = of(plot);
      // a client has one colour in all plots, also where another one is absent
      const all = Object.values(page.plots).filter((each) => each.kind === "clients").flatMap(of);
      made.encoding.color.scale = { domain: [...new Set(all.map((row) => row.client))].sort() };
      made.encoding.color.legend.values = [...new Set(rows.map((row) => row.client))].sort();
    }
    Object.assign(made, {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      description: plot.title,
      width: "container",
      autosize: { type: "fit-x", contains: "padding" },
      data: { values: rows },
      config: theme(width),
    });
    const x = made.encoding.x;
    if (plot.kind === "bar") {
      const log = state.barscale === "log";
      // room on the right for the number that stands behind the longest bar
      const most = Math.max(...rows.map((row) => row.value));
      const room = width / Math.max(80, width - 220); // the plot with the number, over the plot without it
      const far = log ? Math.max(10, most) ** room : most * room;
      x.scale = { type: state.barscale, domain: [log ? 1 : 0, far], nice: false };
      if (log) made.layer[0].encoding.x2 = { datum: 1 };
      x.axis = bytes(log);
      made.height = 18 * rows.length + 8 * new Set(rows.map((row) => row.run)).size;
    } else if (plot.kind === "front") {
      x.scale = { type: "log", nice: false, padding: 24 };
      x.axis = bytes(true);
      made.height = 320;
    } else {
      x.field = state.x;
      x.title = titles[state.x];
      x.axis = axis(state.x, state.xscale === "log");
      x.scale = state.xscale === "log" ? { type: "log", nice: false, padding: 8 } : { zero: state.x !== "round", nice: true };
      made.encoding.y.scale = state.yscale === "log" ? { type: "log", nice: false, padding: 10 } : { zero: false };
      made.height = 260;
      made.transform = [];
      if (state.xscale === "log") made.transform.push(positive(state.x));
      if (state.yscale === "log") made.transform.push(positive("value"));
      made.encoding.order = { field: "round", type: "quantitative" };
    }
    return made;
  }

  async function draw(name) {
    const place = document.querySelector(`[data-plot="${name}"]`);
    await vegaEmbed(place, spec(name, place.clientWidth), { renderer: "svg", actions: false, ast: false, tooltip: { theme: dark.matches ? "dark" : "light" } });
    place.dataset.drawn = JSON.stringify(state);
  }

  async function drawAll(kinds) {
    const names = Object.keys(page.plots).filter((name) => !kinds || kinds.includes(page.plots[name].kind));
    for (const name of names) await draw(name);
    document.documentElement.dataset.ready = String(1 + Number(document.documentElement.dataset.ready ?? 0));
  }

  // made when it is opened: thousands of rows nobody asked for would slow the page down
  function fill(details) {
    const name = details.dataset.table;
    const place = details.querySelector("div");
    if (place.firstChild) return;
    const plot = page.plots[name];
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const [, title] of plot.columns) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = title;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const row of plot.rows) {
      const line = body.insertRow();
      for (const [key] of plot.columns) {
        const cell = line.insertCell();
        const value = row[key];
        cell.textContent = typeof value === "number" ? value.toLocaleString("en", { maximumSignificantDigits: 9 }) : value ?? "-";
        if (typeof value === "string") cell.className = "text";
      }
    }
    place.append(table);
  }

  function choose(event) {
    state[event.target.name] = event.target.value;
    document.getElementById("log-note").hidden = state.xscale !== "log";
    const bar = event.target.name === "barscale";
    drawAll(bar ? ["bar"] : ["curve", "clients"]).then(() => {
      document.getElementById("status").textContent = bar
        ? `Bars on a ${state.barscale} axis`
        : `Curves against ${titles[state.x]}, x ${state.xscale}, y ${state.yscale}`;
    });
  }

  function bind() {
    const controls = document.getElementById("controls");
    for (const input of controls.querySelectorAll("input")) input.checked = state[input.name] === input.value;
    document.getElementById("log-note").hidden = state.xscale !== "log";
    controls.addEventListener("change", choose);
    controls.addEventListener("submit", (event) => event.preventDefault());
    for (const select of document.querySelectorAll("[data-choose]")) {
      if (chosen[select.dataset.choose]) select.value = chosen[select.dataset.choose];
      select.addEventListener("change", () => {
        chosen[select.dataset.choose] = select.value;
        draw(select.dataset.choose);
      });
    }
    for (const details of document.querySelectorAll("[data-table]")) {
      details.addEventListener("toggle", () => details.open && fill(details));
    }
  }

  // a page that is served follows its run: new records replace what is shown, and choices, focus and place stay
  async function renew(mark) {
    const made = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
    if (!made.getElementById("data")) return;
    page = JSON.parse(made.getElementById("data").textContent);
    const focus = document.activeElement?.name && [document.activeElement.name, document.activeElement.value];
    const open = [...document.querySelectorAll("details")].map((each, i) => each.open && (each.dataset.table ?? i));
    const place = window.scrollY;
    // plots keep their height until they are drawn again, so that nothing jumps
    const heights = [...document.querySelectorAll(".plot")].map((each) => [each.dataset.plot, each.offsetHeight]);
    document.querySelector("header").replaceWith(made.querySelector("header"));
    document.getElementById("main").replaceWith(made.getElementById("main"));
    for (const [name, height] of heights) {
      const plot = document.querySelector(`[data-plot="${name}"]`);
      if (plot) plot.style.minHeight = `${height}px`;
    }
    bind();
    [...document.querySelectorAll("details")].forEach((each, i) => (each.open = open.includes(each.dataset.table ?? i)));
    if (focus) document.querySelector(`[name="${focus[0]}"][value="${focus[1]}"]`)?.focus({ preventScroll: true });
    window.scrollTo(0, place);
    document.getElementById("live").dataset.mark = mark;
    await drawAll();
  }

  async function follow() {
    const live = document.getElementById("live");
    try {
      const { lines, mark } = await (await fetch("state")).json();
      if (lines[0] !== live.querySelector("p").textContent) live.querySelector("p").textContent = lines[0];
      live.querySelector("ul").replaceChildren(...lines.slice(1).map((line) => Object.assign(document.createElement("li"), { textContent: line })));
      if (mark !== live.dataset.mark) await renew(mark);
    } catch {
      live.querySelector("p").textContent = "thinwire watch has ended; the page shows what it last had";
    }
    setTimeout(follow, 2000);
  }

  dark.addEventListener("change", () => drawAll());
  bind();
  drawAll().then(() => document.getElementById("live") && follow());
})();
