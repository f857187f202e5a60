// Metrics over steps: the values thin, their running mean thick, one colour a run.

const runColour = (run) => colour(run + 1); // grey is the start, which belongs to no run

// At most four significant digits, and as many as a reader needs.
function plainNumber(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1);
  if (size >= 1000) return grouped(Math.round(value));
  return String(Number(value.toPrecision(3)));
}
const withUnit = (value, unit) => (unit === "%" ? `${plainNumber(100 * value)} %` : unit ? `${plainNumber(value)} ${unit}` : plainNumber(value));

// As many decimals as tell the ticks apart.
function tickText(tick, step) {
  if (step < 1e-4) return tick === 0 ? "0" : tick.toExponential(1);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), text = tick.toFixed(decimals);
  return Number(text) === Number(tick.toPrecision(12)) ? Number(text).toLocaleString("en-US", { minimumFractionDigits: decimals }) : tick.toFixed(decimals + 1);
}

// Round ticks that hold [low, high].
function niceAxis(low, high, num) {
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
  if (low > 0 && low < 0.5 * high) low = 0;
  const rough = (high - low) / num, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9), ticks = [];
  for (let tick = first; tick <= last; tick += 1) ticks.push(tick * step);
  return { from: first * step, to: last * step, ticks, text: (tick) => tickText(tick, step) };
}

// Where nearly all values lie: a single spike must not press the curve flat.
function reach(series) {
  const values = series.flatMap((curve) => (curve ? curve.raw[1] : [])).sort((a, b) => a - b);
  const thick = series.flatMap((curve) => (curve && curve.smooth ? curve.smooth[1] : []));
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const cut = values.length > 100 ? 0.01 : 0;
  return [Math.min(at(cut), ...thick), Math.max(at(1 - cut), ...thick)];
}

function nearestIndex(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i += 1) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  return best;
}

let numClips = 0;

function lineChart(panel, labels) {
  const { series, unit, points } = panel, factor = unit === "%" ? 100 : 1;
  const lastStep = Math.max(1, ...series.map((curve) => (curve ? curve.raw[0].at(-1) : 0)));
  const hasLabels = labels.length > 1;
  const clip = `clip-${(numClips += 1)}`;
  return chart((width) => {
    const height = 200, left = 46, top = 12, bottom = height - 34;
    const room = hasLabels ? Math.min(width * 0.3, 12 + LETTER * Math.max(...labels.map((label) => Math.min(label.length, 14)))) : 12;
    const right = width - room;
    const [low, high] = reach(series), axis = niceAxis(low * factor, high * factor, 4);
    const across = niceAxis(0, lastStep, width > 420 ? 6 : 4);
    const x = scale(0, lastStep, left, right), yOf = scale(axis.from, axis.to, bottom, top);
    // What is far outside the clip stays near it: browsers give up on coordinates like 1e20.
    const y = (value) => Math.max(top - 1000, Math.min(bottom + 1000, yOf(value * factor)));
    const path = ([steps, values]) => steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`).join("");
    const drawn = series.map((curve, run) => [curve, run]).filter(([curve]) => curve);
    const thick = (curve) => curve.smooth || curve.raw;
    const inside = (value) => Math.max(top, Math.min(bottom, value));
    const ends = spread(drawn.map(([curve]) => inside(y(thick(curve)[1].at(-1)))), 14, top + 4, bottom);
    const cursor = svg("line", { class: "cursor", y1: top, y2: bottom });
    const value = (curve, step) => {
      const [steps, values] = thick(curve), [rawSteps, raw] = curve.raw;
      const i = nearestIndex(steps, step), j = nearestIndex(rawSteps, step);
      return { step: rawSteps[j], text: withUnit(values[i], unit), raw: points ? null : withUnit(raw[j], unit) };
    };
    const move = (event) => {
      const at = event.clientX - drawing.getBoundingClientRect().left;
      const wanted = ((at - left) / (right - left)) * lastStep;
      const [longest] = drawn.reduce((a, b) => (b[0].raw[0].length > a[0].raw[0].length ? b : a));
      const step = longest.raw[0][nearestIndex(longest.raw[0], wanted)];
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      cursor.classList.add("on");
      showTip(event, html("b", {}, `${panel.title}, step ${grouped(step)}`), html("table", {}, drawn.map(([curve, run]) => {
        const shown = value(curve, step);
        return html("tr", {}, html("td", {}, chip(run + 1, short(labels[run], 30))), html("td", {}, html("b", {}, shown.text)),
          html("td", {}, shown.raw === null ? (shown.step === step ? "" : `step ${grouped(shown.step)}`) : `this step ${shown.raw}`));
      })));
    };
    const drawing = svg(
      "svg",
      { width, height, role: "img", "aria-label": `${panel.title} over steps; first and last values are in the table of numbers` },
      svg("clipPath", { id: clip }, svg("rect", { x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8 })),
      axis.ticks.map((tick) => [
        svg("line", { class: "grid-line", x1: left, x2: right, y1: yOf(tick), y2: yOf(tick) }),
        svg("text", { x: left - 7, y: yOf(tick) + 4, "text-anchor": "end" }, axis.text(tick)),
      ]),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      across.ticks.filter((tick) => tick <= lastStep && Number.isInteger(tick)).map((tick) =>
        svg("text", { x: x(tick), y: bottom + 17, "text-anchor": x(tick) > right - 10 ? "end" : "middle" }, grouped(tick))),
      svg("text", { class: "title", x: right, y: height - 3, "text-anchor": "end" }, "step"),
      cursor,
      svg("g", { "clip-path": `url(#${clip})` },
        drawn.map(([curve, run]) => (points ? null : svg("path", { class: `raw ${runColour(run)}`, d: path(curve.raw) }))),
        drawn.map(([curve, run]) => svg("g", { class: runColour(run) },
          svg("path", { class: run < 7 ? "line" : "line second-round", d: path(thick(curve)) }),
          points || curve.raw[0].length < 12 ? curve.raw[0].map((step, i) => svg("circle", { class: "point", cx: x(step), cy: y(curve.raw[1][i]), r: 3.4 })) : null))),
      hasLabels ? drawn.map(([, run], i) => svg("text", { class: `label ${runColour(run)}`, x: right + 6, y: ends[i] + 4 }, short(labels[run], Math.floor((room - 6) / LETTER)))) : null,
      svg("rect", {
        class: "catcher", x: left, y: top, width: Math.max(0, right - left), height: bottom - top,
        pointermove: move, pointerleave: () => { cursor.classList.remove("on"); hideTip(); },
      }),
    );
    return drawing;
  });
}
