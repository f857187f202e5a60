// Puts the page together.

const report = JSON.parse(document.getElementById("report").textContent);
const { runs, panels } = report, labels = runs.map((run) => run.label);
const page = document.getElementById("page");
const STATUS = {
  finished: "finished", running: "running", starting: "starting", interrupted: "stopped", failed: "failed", hung: "stalled", silent: "no sign",
};

function header() {
  return html("header", {},
    html("h1", {}, labels.length > 3 ? `${labels.length} runs` : labels.join(" \u00b7 ")),
    html("p", { class: "note" }, `Written ${report.written}. A page of a run that goes on stays as it is: write it again to see more.`),
    html("div", { class: "runs" }, runs.map((run, place) => html("section", { class: `run ${run.status.kind}` },
      html("h2", {}, chip(place + 1, run.label), html("span", { class: `status ${run.status.kind}` }, STATUS[run.status.kind])),
      html("p", {}, run.status.text),
      html("dl", {}, run.facts.map(([name, value]) => [html("dt", {}, name), html("dd", {}, html("bdi", { class: "data" }, value))]))))));
}

function findingsCard() {
  const found = report.findings;
  if (!found.length) return html("p", { class: "fine", id: "findings" }, "None of the checks of this page found anything to look at; most of them need 20 steps.");
  const item = ({ run, severity, text, advice, read }) => html("li", { class: `finding-${severity}` },
    html("p", {}, html("b", { class: "kind" }, severity === "problem" ? "\u25b2 look now" : "\u25cb note"), labels.length > 1 ? chip(run + 1, labels[run]) : null),
    html("p", { class: "what" }, text), html("p", { class: "advice" }, advice), html("p", { class: "read" }, "More: ", read));
  const order = (severity) => found.filter((finding) => finding.severity === severity).map(item);
  return html("ul", { class: "findings", id: "findings", "aria-label": "what to look at" }, order("problem"), order("note"));
}

function passCard() {
  const given = report.pass_at_k;
  if (!given.length) return null;
  // The start first, in grey; the same start is drawn once.
  const starts = given.filter((row) => row.when === "start" && row.borrowed_from === null), ends = given.filter((row) => row.when === "end");
  const [first, ...others] = starts;
  const rows = [...(first ? [first] : []), ...ends, ...others];
  const ks = Object.keys(rows[0].values).map(Number).filter((k) => rows.every((row) => k in row.values));
  if (!ks.length) return null;
  const isOneStart = starts.length === 1;
  const name = (row) => (row.when === "end" ? (labels.length > 1 ? `${labels[row.run]}` : "end") : isOneStart || labels.length === 1 ? "start" : `${labels[row.run]}, start`);
  const names = rows.map(name);
  // The colour of its run, dashed for one of several starts.
  const places = rows.map((row) => (row === first ? 0 : row.run + (row.when === "end" ? 1 : 8)));
    const borrowed = given.filter((row) => row.borrowed_from !== null);
  const { num_problems: problems, num_samples: samples } = rows[0];
  return card("", first ? "Pass@K at start and end" : "Pass@K at the end",
    `${grouped(problems)} held-out problems, ${grouped(samples)} samples each; 95 % intervals over problems. Another training seed may move more than they say. ` +
      borrowed.map((row) => `${labels[row.run]} starts from the same weights as ${row.borrowed_from}, which evaluated them. `).join(""),
    first ? passCurves({ ks, checkpoints: rows.map((row) => ({ pass_at_k: row.values })) }, names, places) : null,
    passTable(rows, ks, names, places));
}

function panelCards() {
  const groups = [...new Set(panels.map((panel) => panel.group))];
  return groups.map((group) => [
    html("h2", { class: "group-title" }, group),
    panels.filter((panel) => panel.group === group).map((panel) => html("section", { class: "card span4" },
      html("h3", {}, panel.title, panel.unit ? `, ${panel.unit}` : ""), html("p", { class: "note" }, panel.note), lineChart(panel, labels))),
  ]);
}

function notes() {
  return [
    panels.length ? html("p", { class: "note wide" },
      "Thin: values of each step; thick: running mean over a twentieth of the steps. Axes hold 98 % of the values. " +
        (report.is_thinned ? `Curves are thinned to ${report.max_points} points that keep the lowest and highest of each stretch; metrics.jsonl has all. ` : "") +
        (report.always_zero.length ? `Always 0, and not drawn: ${report.always_zero.join(", ").toLowerCase()}. ` : "")) : null,
  ];
}

function filesCard() {
  return card("", "Files", "Relative to this page.", html("div", { class: "lists" }, runs.map((run, place) => html("div", {},
    html("h3", {}, chip(place + 1, run.folder)),
    html("ul", { class: "files" }, run.files.map(({ name, link, what }) => html("li", {}, html("a", { href: link }, name), ` ${what}`)))))));
}

function draw() {
  const isSilent = !panels.length;
  const hangs = runs.flatMap((run, place) => (run.hang_summary ? [card("", "Report of the hang", "hang/summary.txt", html("h3", {}, chip(place + 1, run.label)), html("pre", { class: "prompt" }, run.hang_summary))] : []));
  const tables = isSilent ? [] : [card("", "Numbers", "Mean over the last tenth of the steps; small: over the first tenth. Evaluations: the last and the first.", numbersTable(panels, labels))];
  const differences = report.differences.rows.length ? [card("", "What differs between the runs", "From config.yaml; all other settings are the same.", differencesTable(report.differences, labels))] : [];
  page.replaceChildren(header(), findingsCard(), html("div", { class: "grid" },
    hangs, passCard() || [], differences, isSilent ? html("p", { class: "note wide" }, "No step is logged yet: there are no curves.") : [],
    panelCards(), notes(), phaseCards(report.phases, labels), tables, filesCard()));
  for (const box of page.querySelectorAll(".chart")) redraw(box);
}

document.body.append(tip);
draw();
document.documentElement.dataset.state = "drawn";
