// Pass@K over K, with intervals.

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

// ``places`` are those of the curves among the colours.
function passCurves(benchmark, labels, places = labels.map((_, m) => m)) {
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
          class: `band ${colour(places[m])}`,
          d: path(row.map((value) => value[2])) + path(row.map((value) => value[1])).split(/(?=[ML])/).reverse().join("").replace(/M/g, "L") + "Z",
        }),
      ),
      cursor,
      rows.map((row, m) =>
        svg(
          "g",
          { class: colour(places[m]) },
          svg("path", { class: places[m] < 8 ? "line" : "line second-round", d: path(row.map((value) => value[0])) }),
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
          showTip(event, html("b", {}, `Pass@${benchmark.ks[i]}, %, and 95 % interval`), html("table", {}, rows.map((row, m) => valueRow(places[m], labels[m], row[i]))));
        },
        pointerleave: () => { cursor.classList.remove("on"); hideTip(); },
      }),
    );
    return drawing;
  });
}
