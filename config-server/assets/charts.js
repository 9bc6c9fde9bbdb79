// Charts of a group's figures over time, drawn by uPlot from what the API has.
(() => {
  "use strict";
  const section = document.getElementById("charts");
  if (!section) return;
  const REFRESH_EVERY_MS = 30000;
  const HOUR_MS = 3600000;
  // Up to here the figures of every 30 s are there, beyond it those of every 10 minutes.
  const FINE_HOURS_MAX = 6;
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const allowed = Number(section.dataset.allowed);
  let hours = 1, plots = [];

  function bytes(value) {
    let unit = 0;
    while (value >= 1024 && unit + 1 < UNITS.length) { value /= 1024; unit += 1; }
    return `${unit ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
  }

  function span(ms) {
    const s = ms / 1000;
    if (s < 1) return `${Math.round(ms)} ms`;
    if (s < 120) return `${Math.round(s * 10) / 10} s`;
    if (s < 7200) return `${Math.round(s / 6) / 10} min`;
    return s < 172800 ? `${Math.round(s / 360) / 10} h` : `${Math.round(s / 8640) / 10} days`;
  }

  // `least`: the top of the scale when the figures are smaller.
  const CHARTS = {
    rpo: { shown: span, least: 2000, lines: [["age", "line-a", (s) => (s.rpo_ms < 0 ? null : s.rpo_ms)], ["allowed", "line-limit", null]] },
    rates: {
      shown: (value) => `${bytes(value)}/s`, least: 10240,
      lines: [["written", "line-a", (s) => s.churn_bytes_per_s], ["sent", "line-b", (s) => s.sent_bytes_per_s]],
    },
    waiting: {
      shown: bytes, least: 10240,
      lines: [["to be read", "line-a", (s) => s.dirty_bytes], ["to be sent", "line-b", (s) => s.unsent_bytes]],
    },
  };

  // A colour of the style sheet, as it is in this theme.
  function colour(name) {
    const probe = document.createElement("span");
    probe.className = name;
    section.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  function draw(samples) {
    for (const plot of plots) plot.destroy();
    plots = [];
    const times = samples.map((sample) => sample.time / 1000);
    const [grid, text] = [colour("line-grid"), colour("line-text")];
    for (const figure of section.querySelectorAll("figure")) {
      const { shown, least, lines } = CHARTS[figure.dataset.series];
      const place = figure.querySelector(".plot");
      const most = Math.max(0, ...samples.flatMap((s) => lines.map(([, , of]) => (of ? of(s) ?? 0 : 0))));
      // A limit far above everything would press the figures flat; then it is told in words only.
      const kept = lines.filter(([, , of]) => of || allowed <= most * 4);
      const data = [times, ...kept.map(([, , of]) => samples.map(of ?? (() => allowed)))];
      const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
      const options = {
        width: Math.max(240, place.clientWidth),
        height: 180,
        cursor: { y: false },
        legend: { live: true },
        scales: {
          x: { time: true, range: () => [Date.now() / 1000 - hours * 3600, Date.now() / 1000] },
          y: { range: (_, low, high) => [0, Math.max(high ?? 0, least) * 1.1] },
        },
        axes: [axis, { ...axis, size: 76, values: (_, ticks) => ticks.map(shown) }],
        series: [
          {},
          ...kept.map(([label, line, of]) => ({
            label, stroke: colour(line), width: of ? 2 : 1, dash: of ? undefined : [6, 4], spanGaps: false,
            points: { show: of ? samples.length < 60 : false, size: 5 },
            value: (_, value) => (value == null ? "–" : shown(value)),
          })),
        ],
      };
      plots.push(new uPlot(options, data, place));
      const [, , newest] = lines[0];
      const value = samples.length ? newest(samples[samples.length - 1]) : null;
      figure.querySelector(".latest").textContent = value == null ? "" : `, last ${shown(value)}`;
    }
  }

  let samples = [];
  async function load() {
    const step = hours <= FINE_HOURS_MAX ? 30 : 600;
    const to = Date.now(), from = Math.floor(to - hours * HOUR_MS);
    const note = document.getElementById("charts-say");
    try {
      // The API gives 2000 figures at once.
      samples = [];
      for (let start = from; start < to; start += 2000 * step * 1000) {
        const end = Math.min(to, start + 2000 * step * 1000 - 1);
        const answer = await fetch(`${section.dataset.samples}?step_s=${step}&from=${start}&to=${end}`);
        if (!answer.ok) throw new Error((await answer.json()).detail);
        samples.push(...(await answer.json()));
      }
      note.hidden = samples.length > 0;
      section.classList.toggle("empty", samples.length === 0);
      if (samples.length) draw(samples);
    } catch (error) {
      note.hidden = false;
      note.textContent = `The figures cannot be read: ${error.message}`;
    }
  }

  for (const button of section.querySelectorAll("button[data-hours]")) {
    button.addEventListener("click", () => {
      hours = Number(button.dataset.hours);
      for (const other of section.querySelectorAll("button[data-hours]")) other.setAttribute("aria-pressed", String(other === button));
      load();
    });
  }
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && samples.length) draw(samples);
    width = innerWidth;
  });
  document.addEventListener("theme", () => { if (samples.length) draw(samples); });
  setInterval(() => { if (!document.hidden) load(); }, REFRESH_EVERY_MS);
  load();
})();
