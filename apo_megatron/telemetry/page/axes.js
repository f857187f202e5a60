// What charts are measured with.

const LETTER = 8; // width of a letter of a label, at most

const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from || 1)) * (end - start);

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
