// Which experts wrote a reply: a row a layer, a column an expert. The numbers say what shades do.
function heatmap(counts) {
  const head = element("tr", {}, element("th", { scope: "col", textContent: "layer" }));
  counts[0].forEach((_, expert) =>
    head.append(element("th", { scope: "col", textContent: expert })));
  const table = element("table", {},
    element("caption", { className: "unseen", textContent: "Share of each expert, in percent" }),
    element("thead", {}, head));
  const body = element("tbody");
  counts.forEach((row, layer) => {
    const all = row.reduce((sum, count) => sum + count, 0);
    const line = element("tr", {}, element("th", { scope: "row", textContent: layer }));
    for (const count of row) {
      const share = (100 * count) / all;
      const cell = element("td", { textContent: Math.round(share) });
      cell.style.setProperty("--share", Math.min(2 * share, 60)); // darker, and it is not read
      line.append(cell);
    }
    body.append(line);
  });
  table.append(body);
  const even = (100 / counts[0].length).toPrecision(3);
  const note = `Percent of a layer's activations that went to each expert; even is ${even}.`;
  const scroll = element("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Experts by layer");
  return element("details", { className: "experts" },
    element("summary", { textContent: "Experts of this reply" }),
    element("p", { className: "faint", textContent: note }), scroll);
}
