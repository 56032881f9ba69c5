// A reply as text, token by token, and what else each token could have been. Text is always set as
// text. One token of a reply is in the tab order; arrows move along the others.
const byId = (id) => document.getElementById(id);
const tip = byId("tip");
const likelihoods = new WeakMap(); // a token's element -> what the API reported of its tokens

function element(name, options = {}, ...children) {
  const made = Object.assign(document.createElement(name), options);
  made.append(...children);
  return made;
}

class ReplyText {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.waiting = []; // reported tokens whose text has not come yet
  }

  add(text, reported) {
    this.text += text;
    this.waiting.push(...(reported ?? []));
    if (!text) return;
    if (this.waiting.length) this.#put(text);
    else this.element.append(text);
  }

  end() {
    if (this.waiting.length) this.#put("").classList.add("end");
    this.element.replaceChildren(...drawn(this.text, piecesOf(this.element)));
  }

  #put(text) {
    const token = element("span", { className: "token", textContent: text, tabIndex: -1 });
    if (!this.element.querySelector(".token")) token.tabIndex = 0;
    const share = Math.min(...this.waiting.map((each) => Math.exp(each.logprob)));
    if (share < 0.1) token.classList.add("unlikely");
    else if (share < 0.5) token.classList.add("unsure");
    likelihoods.set(token, this.waiting);
    this.waiting = [];
    this.element.append(token);
    return token;
  }
}

const visible = (text) => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5") || "(none)";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

function row(entry, chosen) {
  const mark = chosen ? "\u2192 " : "";
  return element("tr", { className: chosen ? "chosen" : "" },
    element("td", { textContent: mark + visible(entry.token) }),
    element("td", { textContent: percent(entry.logprob) }));
}

function showTip(token) {
  const table = element("table");
  for (const each of likelihoods.get(token)) {
    const others = each.top_logprobs.filter((other) => other.token !== each.token);
    table.append(row(each, true), ...others.map((other) => row(other, false)));
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  token.setAttribute("aria-describedby", tip.id);
  const place = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const right = document.documentElement.clientWidth - tip.offsetWidth - 4;
  const below = place.bottom + 6;
  const fits = below + tip.offsetHeight <= window.innerHeight;
  tip.style.left = `${Math.max(4, Math.min(place.left, right))}px`;
  tip.style.top = `${Math.max(4, fits ? below : place.top - tip.offsetHeight - 6)}px`;
}

function hideTip() {
  if (tip.hidden) return false;
  tip.hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  return true;
}

function moveAlong(event) {
  const tokens = [...event.target.closest(".text").querySelectorAll(".token")];
  const here = tokens.indexOf(event.target);
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 };
  const next = tokens[to[event.key]];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

const isToken = (event) => event.target instanceof Element && event.target.matches(".token");
for (const kind of ["mouseover", "focusin"])
  document.addEventListener(kind, (event) => isToken(event) && (hideTip(), showTip(event.target)));
for (const kind of ["mouseout", "focusout"])
  document.addEventListener(kind, (event) => isToken(event) && hideTip());
document.addEventListener("keydown", (event) => isToken(event) && moveAlong(event));
document.addEventListener("scroll", hideTip, { capture: true, passive: true });
