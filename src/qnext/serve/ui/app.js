// The chat page: sends the conversation, shows the answer as it streams.
// Everything a person or a model wrote enters the page as text (textContent), never as HTML.

const page = (id) => document.getElementById(id);
const log = page("log");
const scroller = page("scroller");
const prompt = page("prompt");
const send = page("send");
const thinking = page("thinking");

/** Messages of this conversation, as the server wants them. */
let messages = [];
/** Ends the answer that is being written; null while none is. */
let answering = null;

// -- server ------------------------------------------------------------------

/** Yields the objects of a stream of server-sent events, until "[DONE]" or its end. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** The server's own words for what went wrong. */
async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

async function ask(signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    signal,
    body: JSON.stringify({
      messages,
      stream: true,
      stream_options: { include_usage: true },
      chat_template_kwargs: { enable_thinking: thinking.ariaPressed === "true" },
    }),
  });
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

// -- one turn ----------------------------------------------------------------

function addTurn(template) {
  const turn = page(template).content.firstElementChild.cloneNode(true);
  log.append(turn);
  return turn;
}

/** Shows one answer while it grows. */
class Answer {
  constructor() {
    this.turn = addTurn("model-turn");
    this.fold = this.turn.querySelector(".reasoning");
    this.reasoning = this.fold.querySelector(".text");
    this.text = this.turn.querySelector(".answer");
    this.remark = this.turn.querySelector(".remark");
    this.asked = performance.now();
    this.first = null;
    this.usage = null;
    this.reason = null;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { reasoning_content: reasoning, content } = choice.delta;
    if (reasoning || content) this.first ??= performance.now();
    if (reasoning) this.think(reasoning);
    if (content) {
      this.endThinking();
      this.text.append(content);
    }
    this.reason = choice.finish_reason ?? this.reason;
  }

  think(text) {
    if (this.fold.hidden) {
      this.fold.hidden = false;
      this.fold.classList.add("running");
      this.fold.querySelector("summary").textContent = "Thinking …";
      this.thinkingSince = performance.now();
    }
    this.reasoning.append(text);
  }

  endThinking() {
    if (!this.fold.classList.contains("running")) return;
    this.fold.classList.remove("running");
    const seconds = (performance.now() - this.thinkingSince) / 1000;
    this.fold.querySelector("summary").textContent = `Thought for ${seconds.toFixed(1)} s`;
  }

  end(remark) {
    this.endThinking();
    this.turn.setAttribute("aria-busy", "false");
    this.remark.textContent = remark ?? this.summary();
  }

  fail(message) {
    this.turn.classList.add("failed");
    this.end(message[0].toUpperCase() + message.slice(1));
  }

  summary() {
    if (!this.usage || this.first === null) return "";
    const tokens = this.usage.completion_tokens;
    const seconds = (performance.now() - this.first) / 1000;
    const parts = [`${tokens} tokens`];
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} per second`);
    parts.push(`first after ${((this.first - this.asked) / 1000).toFixed(2)} s`);
    if (this.reason === "length") parts.push("cut off: no room for more tokens");
    return parts.join(", ");
  }
}

async function turn(text) {
  page("welcome").hidden = true;
  const mine = addTurn("user-turn");
  mine.querySelector(".text").textContent = text;
  const conversation = messages;
  conversation.push({ role: "user", content: text });
  const answer = new Answer();
  const stop = new AbortController();
  setAnswering(stop);
  toEnd();
  let failure = null;
  try {
    for await (const chunk of events(await ask(stop.signal))) {
      const atEnd = isAtEnd();
      answer.take(chunk);
      if (atEnd) toEnd();
    }
    if (answer.reason === null) throw new Error("The connection ended before the answer did.");
    answer.end();
  } catch (error) {
    if (stop.signal.aborted) answer.end("Stopped.");
    else failure = error.message;
  }
  if (conversation !== messages) return; // a new chat has begun
  const atEnd = isAtEnd();
  setAnswering(null);
  if (failure === null) {
    if (atEnd) toEnd(); // the remark has added a line
    conversation.push({ role: "assistant", content: answer.text.textContent });
    return;
  }
  // The question goes back into the field, so that it can be sent again.
  conversation.pop();
  mine.classList.add("failed");
  answer.fail(failure);
  if (!prompt.value) {
    prompt.value = text;
    fit();
  }
  toEnd();
}

// -- page --------------------------------------------------------------------

function isAtEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

function setAnswering(stop) {
  answering = stop;
  document.body.classList.toggle("answering", stop !== null);
  send.ariaLabel = stop ? "Stop" : "Send";
  send.title = stop ? "Stop (Escape)" : "Send (Enter)";
  enableSend();
}

function enableSend() {
  send.disabled = answering === null && !prompt.value.trim();
}

/** Makes the field as high as its text; the style sheet sets a limit. */
function fit() {
  const atEnd = isAtEnd();
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  if (atEnd) toEnd();
  enableSend();
}

function submit() {
  const text = prompt.value.trim();
  if (answering !== null || !text) return;
  prompt.value = "";
  fit();
  turn(text);
}

function newChat() {
  answering?.abort();
  messages = [];
  log.replaceChildren();
  page("welcome").hidden = false;
  setAnswering(null);
  prompt.focus();
}

page("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering !== null) answering.abort();
  else submit();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
prompt.addEventListener("input", fit);
page("new").addEventListener("click", newChat);
thinking.addEventListener("click", () => {
  thinking.ariaPressed = thinking.ariaPressed === "true" ? "false" : "true";
});
page("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) turn(event.target.textContent);
});

fit();
try {
  const { data } = await (await fetch("/v1/models")).json();
  page("model").textContent = data[0].id;
  document.title = `${data[0].id} · qnext`;
} catch {
  page("model").textContent = "The server cannot be reached.";
}
