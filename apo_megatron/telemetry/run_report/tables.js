// The numbers again, for reading, copying and screen readers.

function numbersTable(panels, labels) {
  const cell = (curve, unit) => (curve ? [html("b", {}, withUnit(curve.last, unit)), html("small", {}, `from ${withUnit(curve.first, unit)}`)] : "\u2013");
  return html("div", { class: "scroll" }, html("table", { class: labels.length > 3 ? "numbers stacked" : "numbers", id: "numbers" },
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "metric"), labels.map((label, run) => html("th", { scope: "col" }, chip(run + 1, label))))),
    html("tbody", {}, panels.map((panel, place) =>
      html("tr", { class: place && panel.group !== panels[place - 1].group ? "group" : null },
        html("th", { scope: "row" }, panel.title, " ", html("code", {}, panel.metric)),
        panel.series.map((curve) => html("td", {}, cell(curve, panel.unit))))))));
}

function passTable(rows, ks, names, places) {
  return html("div", { class: "scroll" }, html("table", { class: "numbers", id: "pass-at-k" },
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "Pass@K, %"), ks.map((k) => html("th", { scope: "col" }, `@${k}`)))),
    html("tbody", {}, rows.map((row, place) => html("tr", {},
      html("th", { scope: "row" }, chip(places[place], names[place])),
      ks.map((k) => html("td", {}, html("b", {}, percent(row.values[k][0])), html("small", { class: "below" }, interval(row.values[k])))))))));
}

function differencesTable({ rows, num_left_out: numLeftOut }, labels) {
  return [
    html("div", { class: "scroll" }, html("table", { class: "numbers settings", id: "differences" },
      html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "setting"), labels.map((label, run) => html("th", { scope: "col" }, chip(run + 1, label))))),
      html("tbody", {}, rows.map(([name, values]) => html("tr", {}, html("th", { scope: "row" }, html("code", {}, name)), values.map((value) => html("td", {}, value ?? "\u2013"))))))),
    numLeftOut ? html("p", { class: "note" }, `${numLeftOut} more settings differ: compare the config.yaml files.`) : null,
  ];
}
