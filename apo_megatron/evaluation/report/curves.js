// Pass@K curves, and Pass@1 against Pass@K.

const LETTER = 8; // width of a letter of a label, at most

const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from || 1)) * (end - start);

// Ends and step of an axis in per cent that holds all values, never an empty one.
function axisOf(values, width) {
  const low = Math.max(0, Math.min(...values) * 100), high = Math.min(100, Math.max(...values) * 100);
  const step = [1, 2, 5, 10, 20, 25].find((size) => (high - low) / size <= width / 62) || 50;
  let from = Math.max(0, Math.floor(low / step) * step), to = Math.min(100, Math.ceil(high / step) * step);
  if (from === to) [from, to] = [Math.max(0, from - step), Math.min(100, to + step)];
  const ticks = [];
  for (let tick = from; tick <= to + 1e-9; tick += step) ticks.push(tick);
  return { from: from / 100, to: to / 100, ticks };
}

// Keeps labels apart: the y of each, at least ``gap`` from the next, as near to where it belongs as that allows.
function spread(wanted, gap, low, high) {
  const order = wanted.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]);
  const placed = [];
  let previous = low - gap;
  for (const [y, i] of order) previous = placed[i] = Math.max(y, previous + gap);
  let next = high + gap;
  for (const [, i] of order.reverse()) next = placed[i] = Math.min(placed[i], next - gap);
  return placed;
}

// Where the label of each point stands: beside it, at the first of a few places where it covers none of the
// lines, points and labels before it, else where it covers least. Boxes are [left, right, top, bottom].
function besidePoints(points, widths, lines, [left, right, top, bottom]) {
  const covered = [...lines, ...points.map(([x, y]) => [x - 6, x + 6, y - 6, y + 6])];
  const meets = (a, b) => a[0] < b[1] && b[0] < a[1] && a[2] < b[3] && b[2] < a[3];
  const places = [-9, 19, -25, 35, -41, 51].flatMap((dy) => [[1, dy], [-1, dy]]);
  return points.map(([x, y], m) => {
    const options = places.map(([side, dy]) => {
      const start = side > 0 ? x + 9 : x - 9 - widths[m], end = y + dy;
      const box = [start, start + widths[m], end - 11, end + 3];
      const isOutside = box[0] < left || box[1] > right || box[2] < top || box[3] > bottom;
      return { side, box, x: x + side * 9, y: end, cost: 100 * isOutside + covered.filter((other) => meets(box, other)).length };
    });
    const best = options.reduce((a, b) => (b.cost < a.cost ? b : a));
    covered.push(best.box);
    return best;
  });
}

function verticalAxis(axis, y, left, right, title) {
  return [
    axis.ticks.map((tick) => [
      svg("line", { class: "grid-line", x1: left, x2: right, y1: y(tick / 100), y2: y(tick / 100) }),
      svg("text", { x: left - 8, y: y(tick / 100) + 4, "text-anchor": "end" }, tick),
    ]),
    svg("text", { class: "title", x: left - 34, y: y(axis.to) - 14 }, title),
  ];
}

const valueRow = (m, label, value) =>
  html("tr", {}, html("td", {}, chip(m, short(label, 40))), html("td", {}, html("b", {}, percent(value[0]))), html("td", {}, interval(value)));

function passCurves(benchmark, labels) {
  const rows = benchmark.checkpoints.map((checkpoint) => benchmark.ks.map((k) => checkpoint.pass_at_k[k]));
  return chart((width) => {
    const height = 350, left = 42, top = 30, bottom = height - 42;
    const room = Math.min(width * 0.32, 14 + LETTER * Math.max(...labels.map((label) => Math.min(label.length, 24))));
    const right = width - room;
    const axis = axisOf(rows.flat(2), bottom - top);
    const logs = benchmark.ks.map(Math.log2);
    const x = logs.length === 1 ? () => (left + right) / 2 : scale(logs[0], logs[logs.length - 1], left + 8, right - 6);
    const y = scale(axis.from, axis.to, bottom, top);
    const path = (values) => values.map((value, i) => `${i ? "L" : "M"}${x(logs[i]).toFixed(1)},${y(value).toFixed(1)}`).join("");
    const cursor = svg("line", { class: "cursor", y1: top, y2: bottom });
    const ends = spread(rows.map((row) => y(row[row.length - 1][0])), 16, top, bottom);
    const nearest = (event) => {
      const at = event.clientX - drawing.getBoundingClientRect().left;
      return logs.reduce((best, log, i) => (Math.abs(x(log) - at) < Math.abs(x(logs[best]) - at) ? i : best), 0);
    };
    const drawing = svg(
      "svg",
      { width, height, class: rows.length > 3 ? "many" : null, role: "img", "aria-label": `Pass@K of ${labels.join(", ")}; the numbers are in the table` },
      verticalAxis(axis, y, left, right, "Pass@K, %"),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      logs.map((log, i) => [
        svg("line", { class: "axis", x1: x(log), x2: x(log), y1: bottom, y2: bottom + 5 }),
        svg("text", { x: x(log), y: bottom + 19, "text-anchor": "middle" }, benchmark.ks[i]),
      ]),
      svg("text", { class: "title", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, "K, samples per problem (log scale)"),
      rows.map((row, m) =>
        svg("path", {
          class: `band ${colour(m)}`,
          d: path(row.map((value) => value[2])) + path(row.map((value) => value[1])).split(/(?=[ML])/).reverse().join("").replace(/M/g, "L") + "Z",
        }),
      ),
      cursor,
      rows.map((row, m) =>
        svg(
          "g",
          { class: colour(m) },
          svg("path", { class: m < 8 ? "line" : "line second-round", d: path(row.map((value) => value[0])) }),
          row.map((value, i) => svg("circle", { class: "point", cx: x(logs[i]), cy: y(value[0]), r: 3.6 })),
          svg("text", { class: "label", x: right + 6, y: ends[m] + 4 }, short(labels[m], Math.floor((room - 6) / LETTER))),
        ),
      ),
      svg("rect", {
        class: "catcher", x: left, y: top, width: right - left, height: bottom - top,
        pointermove: (event) => {
          const i = nearest(event);
          cursor.setAttribute("x1", x(logs[i]));
          cursor.setAttribute("x2", x(logs[i]));
          cursor.classList.add("on");
          showTip(event, html("b", {}, `Pass@${benchmark.ks[i]}, %, and 95 % interval`), html("table", {}, rows.map((row, m) => valueRow(m, labels[m], row[i]))));
        },
        pointerleave: () => { cursor.classList.remove("on"); hideTip(); },
      }),
    );
    return drawing;
  });
}

function frontier(benchmark, labels) {
  const first = benchmark.ks[0], last = benchmark.ks[benchmark.ks.length - 1];
  const points = benchmark.checkpoints.map((checkpoint) => [checkpoint.pass_at_k[first], checkpoint.pass_at_k[last]]);
  return chart((width) => {
    const height = 350, left = 42, top = 30, right = width - 12, bottom = height - 42;
    const across = axisOf(points.map((point) => point[0]).flat(), right - left), up = axisOf(points.map((point) => point[1]).flat(), bottom - top);
    const x = scale(across.from, across.to, left, right), y = scale(up.from, up.to, bottom, top);
    const [baseX, baseY] = [x(points[0][0][0]), y(points[0][1][0])];
    const guides = points.length > 1 ? [[baseX, baseX, top, bottom], [left, right, baseY, baseY]] : [];
    const crosses = points.flatMap(([[px, fromX, toX], [py, fromY, toY]]) =>
      [[x(fromX), x(toX), y(py), y(py)], [x(px), x(px), y(toY), y(fromY)]]);
    const placed = besidePoints(
      points.map(([px, py]) => [x(px[0]), y(py[0])]), labels.map((label) => LETTER * Math.min(label.length, 24)),
      [...guides, ...crosses], [left, width, top - 10, bottom]);
    return svg(
      "svg",
      { width, height, role: "img", "aria-label": `Pass@${first} against Pass@${last} of ${labels.join(", ")}` },
      verticalAxis(up, y, left, right, `Pass@${last}, %`),
      across.ticks.map((tick) => [
        svg("line", { class: "grid-line", x1: x(tick / 100), x2: x(tick / 100), y1: top, y2: bottom }),
        svg("text", { x: x(tick / 100), y: bottom + 19, "text-anchor": "middle" }, tick),
      ]),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      svg("line", { class: "axis", x1: left, x2: left, y1: top, y2: bottom }),
      svg("text", { class: "title", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, `Pass@${first}, %`),
      points.length > 1 ? [
        guides.map(([x1, x2, y1, y2]) => svg("line", { class: "guide c0", x1, x2, y1, y2 })),
        right - baseX > 150 && baseY - top > 40 && svg("text", { class: "corner", x: right - 5, y: top + 12, "text-anchor": "end" }, "better at both"),
        right - baseX > 150 && bottom - baseY > 40 && svg("text", { class: "corner", x: right - 5, y: bottom - 8, "text-anchor": "end" }, "sharper but narrower"),
      ].filter(Boolean) : [],
      points.map(([px, py], m) => {
        const cx = x(px[0]), cy = y(py[0]), { side, ...at } = placed[m];
        return svg(
          "g",
          { class: colour(m) },
          svg("line", { class: "cross", x1: x(px[1]), x2: x(px[2]), y1: cy, y2: cy }),
          svg("line", { class: "cross", x1: cx, x2: cx, y1: y(py[1]), y2: y(py[2]) }),
          svg("circle", { class: "point", cx, cy, r: 5.5 }),
          svg("text", { class: "label", x: at.x, y: at.y, "text-anchor": side > 0 ? "start" : "end" }, short(labels[m], 24)),
          svg("circle", {
            class: "catcher", cx, cy, r: 14,
            pointermove: (event) => showTip(event, html("b", {}, labels[m]), html("table", {}, valueRow(m, `Pass@${first}`, px), valueRow(m, `Pass@${last}`, py))),
            pointerleave: hideTip,
          }),
        );
      }),
    );
  });
}
