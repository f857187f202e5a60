// Pass@1 against Pass@K.

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
