// The conversation: pairs of message and reply. An exchange without any text changes nothing.
const log = byId("log"), composer = byId("composer"), message = byId("message");
let turns = []; // {role, content, element, reply}: the last of a reply alone
let running = null; // the AbortController of the reply that comes
let editing = false;

const say = (text) => { byId("status").textContent = text; };
const complain = (text) => { byId("alert").textContent = text; };

function update() {
  for (const [id, enabled] of [["send", !running], ["stop", running],
    ["regenerate", !running && turns.length], ["edit", !running && turns.length],
    ["clear", !running && turns.length],
    ["continue", !running && turns.length && turns.at(-1).reply.finish !== "stop"]])
    byId(id).disabled = !enabled;
  byId("send").textContent = editing ? "Send edited" : "Send";
  byId("message-label").textContent = editing ? "Edited message (Esc keeps the old)" : "Message";
  byId("empty").hidden = turns.length > 0;
}

function articleOf(role, ...children) {
  const who = role === "user" ? "You" : "Model";
  const article = element("article", { className: role }, element("h2", { textContent: who }),
    ...children);
  article.setAttribute("aria-label", `${who}, message ${Math.ceil((turns.length + 1) / 2)}`);
  return article;
}

function addTurn(turn) {
  turns.push(turn);
  log.append(turn.element);
}

function settings() {
  const fields = byId("fields");
  if (!fields.checkValidity()) {
    byId("settings").open = true; // a field that is not shown cannot say what is wrong
    fields.reportValidity();
    return null;
  }
  const given = {};
  for (const input of fields.querySelectorAll("input[type=number]"))
    if (input.value !== "") given[input.id] = Number(input.value);
  if (byId("logprobs").checked) Object.assign(given, { logprobs: true, top_logprobs: 5 });
  if (byId("expert_counts").checked) given.expert_counts = true;
  return given;
}

function statsOf(reply) {
  const { usage, begun, first, last } = reply;
  const parts = [{ length: "cut short: length" }[reply.finish] ?? (reply.finish ? "" : "stopped")];
  if (usage) {
    const rate = ((usage.completion_tokens - 1) * 1000) / (last - first);
    const many = usage.completion_tokens > 1;
    parts.push(`${usage.completion_tokens} ${many ? "tokens" : "token"}`,
      many ? `${rate.toFixed(1)} tok/s` : "",
      `prompt ${usage.prompt_tokens} (${usage.prompt_tokens_details.cached_tokens} cached)`);
  }
  if (first) parts.push(`first token ${((first - begun) / 1000).toFixed(2)} s`);
  return parts.filter(Boolean).join(" \u00b7 ");
}

// Fill a reply from the stream. Throws what ends it early, with what came kept in `reply`.
async function receive(reply, body) {
  for await (const chunk of chunks(body, running.signal)) {
    reply.usage = chunk.usage ?? reply.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (choice.delta.content || choice.logprobs) {
      reply.last = performance.now();
      reply.first ??= reply.last;
    }
    reply.shown.add(choice.delta.content ?? "", choice.logprobs?.content);
    reply.finish = choice.finish_reason ?? reply.finish;
    reply.experts = choice.expert_counts ?? reply.experts;
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

// Send a message in the place of the last `replaced` turns; null goes on with the last reply.
async function exchange(content, replaced) {
  const given = settings();
  if (running || given === null) return;
  const last = content === null ? turns.at(-1) : null;
  const kept = turns.splice(turns.length - replaced);
  kept.forEach((turn) => turn.element.remove());
  complain("");
  if (last) given.continue_final_message = true;
  else {
    editing = false;
    message.value = "";
    const asked = element("div", { className: "text", textContent: content });
    addTurn({ role: "user", content, element: articleOf("user", asked) });
  }
  const reply = last?.reply ?? { shown: new ReplyText(element("div", { className: "text" })) };
  const stats = element("p", { className: "stats" });
  const article = last?.element ?? articleOf("assistant", reply.shown.element, stats);
  const before = reply.shown.text;
  Object.assign(reply, { begun: performance.now(), first: undefined, finish: undefined });
  log.append(article);
  log.scrollTop = log.scrollHeight;
  running = new AbortController();
  log.setAttribute("aria-busy", "true"); // read out once it is whole
  update();
  say("The model writes.");
  const system = byId("system").value;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  let failure = null;
  try {
    await receive(reply, { messages, ...given, stream: true,
      stream_options: { include_usage: true } });
  } catch (error) {
    if (error.name !== "AbortError") failure = error;
  }
  running = null;
  reply.shown.end();
  if (reply.shown.text !== before || reply.finish) {
    article.querySelector(".stats").textContent = statsOf(reply);
    article.querySelector(".experts")?.remove();
    if (reply.experts) article.append(heatmap(reply.experts));
    if (last) last.content = reply.shown.text;
    else turns.push({ role: "assistant", content: reply.shown.text, element: article, reply });
    const how = { stop: "The reply is complete.", length: "Cut by its length; Continue goes on." };
    say(how[reply.finish] ?? "Stopped; what was written stays.");
  } else {
    if (!last) {
      article.remove();
      turns.pop().element.remove();
      kept.forEach(addTurn);
      if (!replaced || content !== kept[0].content) message.value = content;
    }
    say("Stopped before the first token; the conversation is as it was.");
  }
  log.setAttribute("aria-busy", "false");
  log.scrollTop = log.scrollHeight;
  update();
  message.focus();
  if (failure) {
    say("");
    complain(failure.status ? failure.message : `The server is gone: ${failure.message}`);
    if (failure.status === 401) askForKey();
  }
}

const send = () => message.value.trim() && exchange(message.value, editing ? 2 : 0);
const stop = () => running?.abort();

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || hideTip()) return;
  if (editing && !running) {
    editing = false;
    message.value = "";
    update();
  }
  stop();
});
byId("stop").addEventListener("click", stop);
byId("continue").addEventListener("click", () => exchange(null, 0));
byId("regenerate").addEventListener("click", () => exchange(turns.at(-2).content, 2));
byId("edit").addEventListener("click", () => {
  editing = true;
  message.value = turns.at(-2).content;
  update();
  message.focus();
});
byId("clear").addEventListener("click", () => {
  turns.forEach((turn) => turn.element.remove());
  turns = [];
  editing = false;
  update();
  complain("");
  say("A new chat.");
  message.focus();
});
byId("fields").addEventListener("submit", (event) => event.preventDefault());

const askForKey = () => byId("key-dialog").open || byId("key-dialog").showModal();

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  byId("key").value = "";
  byId("key-dialog").close();
  connect();
});

async function connect() {
  try {
    const { data: [model] } = await (await request("/v1/models")).json();
    byId("model").textContent =
      `${model.id} \u00b7 context ${model.max_model_len.toLocaleString("en")} tokens`;
    document.title = `${model.id} \u00b7 qmix`;
    complain("");
  } catch (error) {
    byId("model").textContent = "not connected";
    complain(error.status ? error.message : "The server does not answer.");
    if (error.status === 401) askForKey();
  }
}

if (window.matchMedia("(max-width: 55rem)").matches)
  document.querySelectorAll("aside details").forEach((each) => { each.open = false; });
update();
connect();
pollSlots();
