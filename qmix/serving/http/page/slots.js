// The slots of the server, asked once a second while the page is seen.
const POLL_MS = 1000;

function showSlots({ slots, waiting }) {
  const busy = slots.filter((slot) => slot.state !== "free").length;
  byId("load").textContent = `${busy} of ${slots.length} busy, ${waiting} waiting`;
  byId("slots").tBodies[0].replaceChildren(...slots.map((slot, index) =>
    element("tr", {}, ...[index, slot.state, slot.prompt_tokens, slot.new_tokens].map((text) =>
      element("td", { textContent: text })))));
}

async function pollSlots() {
  try {
    if (!document.hidden) showSlots(await (await request("/slots")).json());
  } catch (error) {
    byId("slots").tBodies[0].replaceChildren(); // what they did is no longer so
    byId("load").textContent = error.status ? error.message : "the server does not answer";
  }
  setTimeout(pollSlots, POLL_MS);
}
