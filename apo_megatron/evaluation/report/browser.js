// The problems as a list, and the samples of one.

const MARKS = { right: "\u2713 right", wrong: "\u2717 wrong", unjudged: "? unjudged" };
const parsedSamples = new Map(); // a benchmark's samples are read when they are first asked for

function samplesOf(benchmarkPlace, checkpoint) {
  const name = `samples-${benchmarkPlace}-${checkpoint}`;
  if (!parsedSamples.has(name)) parsedSamples.set(name, JSON.parse(document.getElementById(name).textContent));
  return parsedSamples.get(name);
}

function sampleBox(sample) {
  const text = html("pre", { dir: "auto" }, sample.text || "(empty)");
  const box = html("article", { class: "sample", "data-verdict": sample.verdict },
    html("header", {},
      html("span", { class: `verdict ${sample.verdict}` }, MARKS[sample.verdict]),
      html("span", { class: "answer" }, sample.answer === null ? "no answer" : html("bdi", { class: "data" }, sample.answer)),
      sample.is_truncated ? html("span", { class: "truncated" }, "truncated") : null,
      html("span", { class: "facts" }, `sample ${sample.index}${sample.num_tokens === null ? "" : ` \u00b7 ${grouped(sample.num_tokens)} tokens`}`)),
    text,
    sample.num_left_out ? html("p", { class: "cut" }, `${grouped(sample.num_left_out)} more characters are left out here`) : null);
  if (sample.text.length > 450 || sample.text.split("\n").length > 7) {
    const more = html("button", { class: "more", type: "button", "aria-expanded": "false", click: () => {
      const open = box.classList.toggle("open");
      more.textContent = open ? "show less" : "show all";
      more.setAttribute("aria-expanded", open);
    } }, "show all");
    box.classList.add("long");
    text.after(more);
  }
  return box;
}

function detailOf(benchmark, benchmarkPlace, labels, pair, i) {
  const problem = benchmark.problems[i], n = benchmark.num_samples;
  const checkpoints = pair[0] === pair[1] ? [pair[0]] : pair;
  return [
    html("h3", {}, html("bdi", { class: "data" }, problem.id)),
    html("pre", { class: "prompt", dir: "auto", tabindex: 0 }, problem.prompt),
    problem.num_left_out ? html("p", { class: "note" }, `${grouped(problem.num_left_out)} more characters of the prompt are left out here`) : null,
    html("p", { class: "gold" }, "Gold answer: ", problem.gold === null ? "none given" : html("b", {}, html("bdi", { class: "data" }, problem.gold))),
    html("div", { class: "columns" }, checkpoints.map((m) => {
      const shown = samplesOf(benchmarkPlace, m)[i], checkpoint = benchmark.checkpoints[m];
      return html("div", { "data-checkpoint": m },
        html("h4", {}, chip(m, labels[m]), ` ${checkpoint.correct[i]} right of ${grouped(n)}, ${shown.length} shown`),
        shown.map(sampleBox),
        shown.length ? null : html("p", { class: "note" }, "No sample is in the page; see the folder of the evaluation."));
    })),
  ].filter(Boolean);
}

// Returns the card and a function that shows problem i.
function browserCard(benchmark, benchmarkPlace, labels, pair) {
  const [a, b] = pair, isPair = a !== b, n = benchmark.num_samples;
  const detail = html("div", { class: "detail", id: "detail", "aria-live": "polite" });
  const count = html("span", { class: "note", role: "status" });
  const list = html("div", { class: "problems", role: "listbox", tabindex: 0, "aria-label": "problems", id: "problems" });
  const titles = isPair ? Object.keys(GROUPS) : ["all", "both", "neither"];
  const oneTitle = { all: "all problems", both: "solved", neither: "unsolved" };
  const group = html("select", { "aria-label": "which problems", change: filter },
    titles.map((name) => html("option", { value: name }, `${isPair ? GROUPS[name].title(labels[a], labels[b]) : oneTitle[name]} (${inGroup(benchmark, pair, name).length})`)));
  const search = html("input", { type: "search", placeholder: "Search id, prompt, gold answer", "aria-label": "search", input: filter });
  const haystacks = benchmark.problems.map(({ id, prompt, gold }) => `${id}\n${prompt}\n${gold || ""}`.toLowerCase());
  const items = benchmark.problems.map(({ id }, i) =>
    html("div", { class: "problem", role: "option", id: `problem-${i}`, "aria-selected": "false", click: () => { select(i); list.focus({ preventScroll: true }); } },
      html("span", {}, html("bdi", { class: "data" }, id)),
      (isPair ? pair : [a]).map((m) => html("b", { class: colour(m), title: `${benchmark.checkpoints[m].correct[i]} right of ${grouped(n)}, ${labels[m]}` }, benchmark.checkpoints[m].correct[i]))));
  let listed = [], selected = null;

  function filter() {
    const words = search.value.toLowerCase();
    listed = inGroup(benchmark, pair, group.value).filter((i) => haystacks[i].includes(words));
    list.replaceChildren(...listed.map((i) => items[i]));
    count.textContent = `${listed.length} of ${items.length} problems`;
    if (!listed.includes(selected)) {
      if (listed.length) select(listed[0]);
      else { selected = null; detail.replaceChildren(html("p", { class: "note" }, "No problem fits.")); }
    }
  }

  function select(i) {
    if (selected !== null) items[selected].setAttribute("aria-selected", "false");
    selected = i;
    items[i].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", `problem-${i}`);
    const top = items[i].offsetTop, end = top + items[i].offsetHeight;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (end > list.scrollTop + list.clientHeight) list.scrollTop = end - list.clientHeight;
    detail.replaceChildren(...detailOf(benchmark, benchmarkPlace, labels, pair, i));
  }

  const MOVES = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (move === undefined || event.ctrlKey || event.metaKey || event.altKey || !listed.length) return;
    event.preventDefault();
    select(listed[Math.max(0, Math.min(listed.length - 1, listed.indexOf(selected) + move))]);
  });

  function open(i) {
    group.value = "all";
    search.value = "";
    filter();
    select(i);
    list.focus({ preventScroll: true });
    section.scrollIntoView({ behavior: "smooth", block: "start" });
  }

  const most = (name) => Math.max(...pair.map((m) => benchmark.checkpoints[m][name]));
  const section = card("", "Samples",
    `For each problem and checkpoint the first samples, right and wrong ones alike: at most ${most("num_shown")}, cut at ` +
      `${grouped(most("num_characters"))} characters, so they show what answers look like, not how often they are right. ` +
      `The numbers in the list are right samples of ${grouped(n)}.`,
    html("div", { class: "tools" }, group, search, count, html("span", { class: "note" }, html("kbd", {}, "\u2191"), " ", html("kbd", {}, "\u2193"), " next problem  ", html("kbd", {}, "/"), " search")),
    html("div", { class: "browser" }, list, detail));
  section.id = "browser";
  filter();
  return { section, open, search };
}
