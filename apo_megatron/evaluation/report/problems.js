// Problem by problem: the solve rates of two checkpoints, and the problems that only one of them solves.

// Places of the problems by the solve rate of A, hardest first; where it is the same, by that of B.
function byDifficulty(a, b) {
  return a.map((_, i) => i).sort((i, j) => a[i] - a[j] || b[i] - b[j] || i - j);
}

function strip(benchmark, labels, [a, b], open) {
  const n = benchmark.num_samples, ofA = benchmark.checkpoints[a].correct, ofB = benchmark.checkpoints[b].correct;
  const order = byDifficulty(ofA, ofB);
  return chart((width) => {
    const height = 270, left = 42, right = width - 6, top = 30, bottom = height - 34;
    const y = (count) => bottom - Math.sqrt(count / n) * (bottom - top); // small rates are where problems are lost
    const slot = (right - left) / order.length, x = (place) => left + (place + 0.5) * slot;
    const radius = Math.max(1.6, Math.min(5, slot * 0.32));
    const steps = order.map((i, place) => `${place ? "L" : "M"}${(left + place * slot).toFixed(1)},${y(ofA[i]).toFixed(1)}H${(left + (place + 1) * slot).toFixed(1)}`).join("");
    const cursor = svg("line", { class: "cursor", y1: top, y2: bottom });
    const at = (event) => Math.min(order.length - 1, Math.max(0, Math.floor((event.clientX - drawing.getBoundingClientRect().left - left) / slot)));
    const mark = (i, place) => {
      const cx = x(place), cy = y(ofB[i]);
      if (ofA[i] > 0 && ofB[i] === 0) return svg("path", { class: "lost", d: `M${cx - radius - 1},${cy - 2 * radius - 1}h${2 * radius + 2}l${-radius - 1},${2 * radius + 2}Z` });
      if (ofA[i] === 0 && ofB[i] > 0) return svg("path", { class: "won", d: `M${cx - radius - 1},${cy + radius}h${2 * radius + 2}l${-radius - 1},${-2 * radius - 2}Z` });
      return svg("circle", { class: `${radius < 3 ? "dot" : "point"} ${colour(b)}`, cx, cy, r: radius });
    };
    const drawing = svg(
      "svg",
      { width, height, role: "img", "aria-label": `Solve rate of each problem, ${labels[a]} and ${labels[b]}` },
      [0, 1, 5, 10, 25, 50, 75, 100].map((tick) => [
        svg("line", { class: "grid-line", x1: left, x2: right, y1: y((tick * n) / 100), y2: y((tick * n) / 100) }),
        svg("text", { x: left - 8, y: y((tick * n) / 100) + 4, "text-anchor": "end" }, tick),
      ]),
      svg("text", { class: "title", x: left - 34, y: top - 14 }, "solve rate, % (square-root scale)"),
      svg("g", { class: colour(a) }, svg("path", { class: "area", d: `${steps}V${bottom}H${left}Z` }), svg("path", { class: "edge", d: steps })),
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      cursor,
      order.map((i, place) =>
        ofA[i] === ofB[i] ? null : svg("line", { class: `stem ${ofA[i] > 0 && ofB[i] === 0 ? "lost" : ofA[i] === 0 ? "won" : colour(b)}`, x1: x(place), x2: x(place), y1: y(ofA[i]), y2: y(ofB[i]), "stroke-width": Math.max(1, Math.min(3, slot * 0.18)) }),
      ),
      a === b ? [] : order.map(mark),
      svg("text", { class: "title", x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, `${order.length} problems, hardest for ${short(labels[a], 24)} first`),
      svg("rect", {
        class: "catcher opens", x: left, y: top - 6, width: right - left, height: bottom - top + 12,
        pointermove: (event) => {
          const place = at(event), i = order[place];
          cursor.setAttribute("x1", x(place));
          cursor.setAttribute("x2", x(place));
          cursor.classList.add("on");
          showTip(event, html("b", {}, benchmark.problems[i].id), html("table", {}, (a === b ? [[a, ofA]] : [[a, ofA], [b, ofB]]).map(([m, counts]) =>
            html("tr", {}, html("td", {}, chip(m, short(labels[m], 40))), html("td", {}, html("b", {}, `${counts[i]} of ${grouped(n)}`))))));
        },
        pointerleave: () => { cursor.classList.remove("on"); hideTip(); },
        click: (event) => open(order[at(event)]),
      }),
    );
    return drawing;
  });
}

const GROUPS = {
  all: { title: () => "all problems", holds: () => true },
  only_a: { title: (a) => `solved by ${a} only`, holds: (a, b) => a > 0 && b === 0 },
  only_b: { title: (a, b) => `solved by ${b} only`, holds: (a, b) => a === 0 && b > 0 },
  both: { title: () => "solved by both", holds: (a, b) => a > 0 && b > 0 },
  neither: { title: () => "solved by neither", holds: (a, b) => a === 0 && b === 0 },
};

function inGroup(benchmark, [a, b], group) {
  const ofA = benchmark.checkpoints[a].correct, ofB = benchmark.checkpoints[b].correct;
  return ofA.map((_, i) => i).filter((i) => GROUPS[group].holds(ofA[i], ofB[i]));
}

function stripCard(benchmark, labels, pair, open) {
  const [a, b] = pair, only = (group) => inGroup(benchmark, pair, group).length;
  return card(
    "",
    "Solve rate of each problem",
    (a === b ? "" : `The step line is ${labels[a]}, the points are ${labels[b]}. `) + "A click opens the samples of a problem.",
    a === b ? null : html("div", { class: "legend" },
      chip(a, labels[a]), chip(b, labels[b]),
      html("span", { class: "verdict wrong" }, `\u25bc ${only("only_a")} lost: solved by ${labels[a]} only`),
      html("span", { class: "verdict right" }, `\u25b2 ${only("only_b")} won: solved by ${labels[b]} only`)),
    strip(benchmark, labels, pair, open),
  );
}

function flipsCard(benchmark, labels, pair, open) {
  const [a, b] = pair, n = benchmark.num_samples;
  const ofA = benchmark.checkpoints[a].correct, ofB = benchmark.checkpoints[b].correct;
  const list = (group, sign) => {
    const found = inGroup(benchmark, pair, group).sort((i, j) => ofA[j] + ofB[j] - ofA[i] - ofB[i] || i - j);
    return html("div", {},
      html("h3", { class: `verdict ${sign > 0 ? "right" : "wrong"}` }, `${sign > 0 ? "\u25b2" : "\u25bc"} ${found.length} ${GROUPS[group].title(labels[a], labels[b])}`),
      found.length ? null : html("p", { class: "note" }, "none"),
      html("ol", { "data-group": group }, found.map((i) =>
        html("li", {}, html("button", { class: "flip", type: "button", click: () => open(i) },
          html("span", {}, html("bdi", { class: "data" }, benchmark.problems[i].id)),
          html("span", { class: "counts" }, html("b", { class: colour(a) }, ofA[i]), ` of ${grouped(n)} \u2192 `, html("b", { class: colour(b) }, ofB[i]), ` of ${grouped(n)}`))))));
  };
  const p = benchmark.flip_p_values[a][b];
  return card(
    "",
    "Problems lost and won",
    `Solved means at least one right sample of ${grouped(n)}. Both solve ${inGroup(benchmark, pair, "both").length} problems, neither ` +
      `${inGroup(benchmark, pair, "neither").length}. McNemar's exact test on the flips: p ${p < 0.001 ? "" : "= "}${chance(p)}. A flip at 1 of ${grouped(n)} is one lucky sample.`,
    html("div", { class: "lists" }, list("only_a", -1), list("only_b", 1)),
  );
}
