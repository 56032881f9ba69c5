// The API as the page needs it. Knows no elements. The key is in this variable and nowhere else.
let key = "";

const refused = (message, status) => Object.assign(new Error(message), { status });

async function request(path, { body, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const options = { headers, signal, cache: "no-store", method: body ? "POST" : "GET" };
  if (body) options.body = JSON.stringify(body);
  const response = await fetch(path, options);
  if (response.ok) return response;
  let message = `${path}: status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy's page: the status says enough.
  }
  throw refused(message, response.status);
}

// The documents of a chat's stream; throws where it ends without its last event.
async function* chunks(body, signal) {
  const response = await request("/v1/chat/completions", { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the reply did");
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a sign of life
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const document = JSON.parse(data);
      if (document.error) throw refused(document.error.message, 500);
      yield document;
    }
  }
}
