// Markdown of a whole reply: elements around its pieces, and marks that are not shown. The text
// stays as it is, so that it is copied as the model wrote it; whatever is no form stays text.
const FORMS = { block: /^(```.*\n)([^]*?)(^```[^\S\n]*$\n?|(?![^]))/, code: /(`)([^`\n]+)(`)/,
  strong: /(\*\*)(?=\S)(.+?)(\*\*)/, heading: /^(#{1,6} +)(.+)()/,
  bullet: /()(?<=^[^\S\n]*)([-*+])()(?= )/ };
const MARKDOWN = new RegExp(Object.values(FORMS).map(({ source }) => source).join("|"), "gm");
const TAGS = { block: "code", code: "code", strong: "strong", heading: "strong", bullet: "span" };

// The texts and tokens of an element, without what is around them.
const piecesOf = (node) => [...node.childNodes].flatMap((each) =>
  each.nodeType === Node.TEXT_NODE || each.matches(".token") ? each : piecesOf(each));

// Shorten a piece; the rest of it.
function cut(piece, at) {
  const text = piece.textContent, rest = piece.cloneNode();
  piece.textContent = text.slice(0, at);
  rest.textContent = text.slice(at);
  likelihoods.set(rest, likelihoods.get(piece));
  rest.tabIndex = -1;
  return rest;
}

function drawn(text, pieces) {
  const nodes = [];
  let done = 0;
  const take = (to) => {
    const taken = [];
    for (; done < to; done += taken.at(-1).textContent.length) {
      if (pieces[0].textContent.length > to - done) pieces.splice(1, 0, cut(pieces[0], to - done));
      taken.push(pieces.shift());
    }
    return taken;
  };
  for (const found of text.matchAll(MARKDOWN)) {
    const group = 1 + 3 * Object.keys(FORMS).findIndex((_, i) => found[3 * i + 2] !== undefined);
    const form = Object.keys(FORMS)[(group - 1) / 3];
    nodes.push(...take(found.index));
    for (const [i, part] of found.slice(group, group + 3).entries()) {
      const [name, className] = i === 1 ? [TAGS[form], form] : ["span", "mark"];
      if (part) nodes.push(element(name, { className }, ...take(done + part.length)));
    }
  }
  return [...nodes, ...pieces];
}
