// Where the time of a step goes: bars of neighbouring steps, and shares of the whole.

const PHASES = ["rollout", "update", "reference", "old log probs", "weight sync", "checkpoint", "cold start", "rollout files"];
const phaseColour = (name) => (name === "other" ? "c0" : `c${1 + (Math.max(0, PHASES.indexOf(name)) % 7)}`);
const seconds = (value) => `${plainNumber(value)} s`;

function phaseBars({ names, ranges, bars }, label) {
  return chart((width) => {
    const height = 220, left = 46, right = width - 8, top = 12, bottom = height - 34;
    const totals = ranges.map((_, i) => bars.reduce((sum, values) => sum + values[i], 0));
    const axis = niceAxis(0, Math.max(...totals), 4), y = scale(axis.from, axis.to, bottom, top);
    const slot = (right - left) / ranges.length, gap = Math.min(2, slot * 0.15);
    const steps = ([from, to]) => (from === to ? `step ${grouped(from)}` : `steps ${grouped(from)} to ${grouped(to)}`);
    const drawing = svg(
      "svg",
      { width, height, role: "img", "aria-label": `Seconds per step by phase of ${label}; the shares are in the table` },
      axis.ticks.map((tick) => [
        svg("line", { class: "grid-line", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
        svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, axis.text(tick)),
      ]),
      ranges.map((range, i) => {
        let below = 0;
        return names.map((name, part) => {
          const from = below;
          below += bars[part][i];
          return svg("rect", { class: `bar-part ${phaseColour(name)}`, x: (left + i * slot + gap / 2).toFixed(1), width: Math.max(0.5, slot - gap).toFixed(1), y: y(below).toFixed(1), height: Math.max(0, y(from) - y(below)).toFixed(1) });
        });
      }),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { x: left, y: bottom + 17 }, grouped(ranges[0][0])),
      svg("text", { x: right, y: bottom + 17, "text-anchor": "end" }, grouped(ranges.at(-1)[1])),
      svg("text", { class: "title", x: (left + right) / 2, y: bottom + 17, "text-anchor": "middle" }, "step; seconds per step"),
      svg("rect", {
        class: "catcher", x: left, y: top, width: Math.max(0, right - left), height: bottom - top,
        pointermove: (event) => {
          const at = event.clientX - drawing.getBoundingClientRect().left;
          const i = Math.max(0, Math.min(ranges.length - 1, Math.floor((at - left) / slot)));
          showTip(event, html("b", {}, `${steps(ranges[i])}: ${seconds(totals[i])} each`), html("table", {}, names.map((name, part) =>
            html("tr", {}, html("td", {}, html("span", { class: `chip ${phaseColour(name)}` }, name)), html("td", {}, html("b", {}, seconds(bars[part][i])))))));
        },
        pointerleave: hideTip,
      }),
    );
    return drawing;
  });
}

function phaseTable({ table }) {
  return html("div", { class: "scroll" }, html("table", { class: "numbers compact" },
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "phase"), ["share", "per step", "in all"].map((name) => html("th", { scope: "col" }, name)))),
    html("tbody", {}, table.map(([name, total, mean, share]) => html("tr", {},
      html("th", { scope: "row" }, name), html("td", {}, `${percent(share)} %`), html("td", {}, seconds(mean)), html("td", {}, seconds(total)))))));
}

function phaseCards(phases, labels) {
  const shown = phases.map((of_run, run) => [of_run, run]).filter(([of_run]) => of_run);
  if (!shown.length) return [];
  const place = (name) => (PHASES.includes(name) ? PHASES.indexOf(name) : name === "other" ? 99 : 98);
  const names = [...new Set(shown.flatMap(([of_run]) => of_run.names))].sort((a, b) => place(a) - place(b));
  return [card("", "Time per phase",
    "Main rank. Bars leave evaluations out, the tables hold them; what is below 1 % of a step is drawn as other.",
    html("div", { class: "legend" }, names.map((name) => html("span", { class: `chip ${phaseColour(name)}` }, name))),
    html("div", { class: "phases" }, shown.map(([of_run, run]) => html("div", {},
      labels.length > 1 ? html("h3", {}, chip(run + 1, labels[run])) : null,
      phaseBars(of_run, labels[run]), phaseTable(of_run)))))];
}
