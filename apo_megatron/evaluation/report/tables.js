// The numbers of a benchmark, and the paired comparisons with the first checkpoint.

function numbersTable(benchmark, labels) {
  const checkpoints = benchmark.checkpoints, total = benchmark.problems.length * benchmark.num_samples;
  const withInterval = (value) => (value ? [percent(value[0]), html("small", {}, interval(value))] : "\u2013");
  const plain = (text) => [text, html("small", {})];
  const length = ({ mean_response_length: tokens }) => plain(tokens === null ? "not known" : grouped(Math.round(tokens)));
  const row = (name, cell, isFirst) => html("tr", { class: isFirst ? "group" : null }, html("th", { scope: "row" }, name), checkpoints.map((checkpoint) => html("td", {}, cell(checkpoint))));
  const majority = [...new Set(checkpoints.flatMap((checkpoint) => Object.keys(checkpoint.majority_at_k)))].sort((a, b) => a - b);
  const rows = [
    ...benchmark.ks.map((k) => row(k === 1 ? "Pass@1 (mean@n), %" : `Pass@${k}, %`, (checkpoint) => withInterval(checkpoint.pass_at_k[k]))),
    ...majority.map((k, i) => row(`majority@${k}, %`, (checkpoint) => withInterval(checkpoint.majority_at_k[k]), i === 0)),
    row("distinct right answers per problem", (checkpoint) => plain(checkpoint.distinct_correct.toFixed(2)), true),
    row("mean length, tokens", length),
    row("truncated, %", (checkpoint) => plain(percent(checkpoint.truncation_rate))),
    row("verifier failures", (checkpoint) => plain(`${grouped(checkpoint.verifier_failures)} of ${grouped(total)}`)),
  ];
  return html("div", { class: "scroll" }, html("table", { class: labels.length > 3 ? "numbers stacked" : "numbers", id: "numbers" },
    html("thead", {}, html("tr", {}, html("th", {}), labels.map((label, m) => html("th", { scope: "col" }, chip(m, label))))),
    html("tbody", {}, rows)));
}

// A difference with its interval as a picture, on the scale of the whole table.
function forest({ difference, ci95: [low, high] }, reach, m) {
  const width = 126, height = 26, x = scale(-reach, reach, 6, width - 6);
  return svg("svg", { width, height, class: colour(m), "aria-hidden": "true" },
    svg("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: height, opacity: 0.5 }),
    svg("line", { class: "cross", x1: x(low), x2: x(high), y1: height / 2, y2: height / 2 }),
    svg("circle", { class: "point", cx: x(difference), cy: height / 2, r: 4 }));
}

function comparisonTables(benchmark, labels) {
  const reach = Math.max(0.01, ...benchmark.comparisons.flat().map(({ ci95, difference }) => Math.max(...[...ci95, difference].map(Math.abs))));
  return benchmark.comparisons.map((rows, place) => {
    const m = place + 1;
    return html("div", { class: "scroll comparison" }, html("table", { class: "numbers" },
      html("caption", {}, chip(m, labels[m])),
      html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "K"), ["difference", "95 % interval", "", "p", "p (Holm)"].map((name) => html("th", { scope: "col" }, name)))),
      html("tbody", {}, rows.map((row) => {
        const sure = row.p_holm < 0.05;
        return html("tr", {},
          html("th", { scope: "row" }, row.k),
          html("td", { class: `${row.difference < 0 ? "down" : "up"}${sure ? " sure" : ""}` }, signed(row.difference)),
          html("td", {}, `${signed(row.ci95[0])} to ${signed(row.ci95[1])}`),
          html("td", { class: "forest" }, forest(row, reach, m)),
          html("td", {}, chance(row.p_value)),
          html("td", { class: sure ? "sure" : null }, chance(row.p_holm)));
      }))));
  });
}

function numbersCards(benchmark, labels) {
  const cards = [card("", "Numbers", "Means over problems; small: 95 % interval.", numbersTable(benchmark, labels))];
  if (labels.length > 1)
    cards.unshift(card("", `Paired differences of Pass@K from ${labels[0]}, in points`,
      "Problem by problem, so that difficulty does not blur them; overlapping intervals of the curves prove nothing. p: two-sided " +
        "sign-flip test. Holm: corrected for the K of one comparison, not for the number of checkpoints and benchmarks. Bold: below 0.05.",
      html("div", { id: "comparisons", class: "comparisons" }, comparisonTables(benchmark, labels))));
  return cards;
}
