// Puts the page together, and again when another benchmark or pair is chosen.

const report = JSON.parse(document.getElementById("report").textContent);
const { labels, benchmarks } = report;
const page = document.getElementById("page");
const chosen = { benchmark: 0, pair: labels.length > 1 ? [0, 1] : [0, 0] };
let browser = null;

function header() {
  const sizes = benchmarks.map((b) => `${b.name}: ${grouped(b.problems.length)} problems \u00d7 ${grouped(b.num_samples)} samples`);
  const others = labels.length > 3 ? `${labels.length - 1} checkpoints` : labels.slice(1).join(", ");
  return html("header", {},
    html("h1", {}, labels.length > 1 ? `${others} against ${labels[0]}` : labels[0]),
    html("p", {}, sizes.join(" \u00b7 ")),
    html("div", { class: "chips" }, labels.map((label, m) => chip(m, label, m === 0 && labels.length > 1 ? html("small", {}, " (reference)") : null))),
    html("p", { class: "note" },
      "An interval says how far a mean could move with another set of as many problems of the same kind (95 %, bootstrap over problems); " +
        "it does not say what another training seed would change."),
    report.warnings.length
      ? html("ul", { class: "warnings", id: "warnings" }, report.warnings.map(({ benchmark, text }) =>
          html("li", {}, benchmark && benchmarks.length > 1 ? html("b", {}, `${benchmark}: `) : null, text)))
      : null);
}

function tabs() {
  return html("div", { class: "tabs", role: "tablist", "aria-label": "benchmark" }, benchmarks.map((benchmark, place) =>
    html("button", { type: "button", role: "tab", "aria-selected": String(place === chosen.benchmark), click: () => { chosen.benchmark = place; draw(); } },
      benchmark.name)));
}

function pairChoice() {
  if (labels.length < 2) return null;
  const choice = (side) => html("select", {
    class: colour(chosen.pair[side]), "aria-label": side ? "compared checkpoint" : "its reference",
    change: (event) => { chosen.pair[side] = Number(event.target.value); draw(); },
  }, labels.map((label, m) => html("option", { value: m, selected: m === chosen.pair[side] }, label)));
  return html("div", { class: "pair" }, "Problems and samples:", choice(0), "\u2192", choice(1));
}

function draw() {
  const benchmark = benchmarks[chosen.benchmark], { pair } = chosen, isPair = pair[0] !== pair[1];
  hideTip();
  resized.disconnect();
  browser = browserCard(benchmark, chosen.benchmark, labels, pair);
  const cards = [
    card("span7", `${benchmark.name}: Pass@K`, "Chance that at least one of K samples is right, mean over problems; bands are 95 % intervals.", passCurves(benchmark, labels)),
    card("span5", "Efficiency and diversity", "One sample against many; crosses are 95 % intervals.", frontier(benchmark, labels)),
    stripCard(benchmark, labels, pair, browser.open),
    ...numbersCards(benchmark, labels),
    ...(isPair ? [flipsCard(benchmark, labels, pair, browser.open)] : []),
    browser.section,
  ];
  page.replaceChildren(header(), html("div", { class: "bar" }, tabs(), pairChoice()), html("div", { class: "grid" }, cards));
  for (const box of page.querySelectorAll(".chart")) redraw(box);
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, select")) return;
  event.preventDefault();
  browser.search.focus();
});
document.body.append(tip);
draw();
document.documentElement.dataset.state = "drawn";
