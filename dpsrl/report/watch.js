// Asks the server of --watch whether there is a newer page, and loads it, unless somebody is typing.

let version = null;

async function ask() {
  const live = byId("live");
  let state = null;
  try { state = await (await fetch("state", { cache: "no-store" })).json(); } catch { /* it has ended */ }
  if (state === null) { live.textContent = "The server of this page has ended; what is shown is its last state."; live.hidden = false; return; }
  version ??= state.version;
  const busy = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  if (state.version !== version && !busy) { location.reload(); return; }
  live.textContent = state.done ? "The run has ended; this page is final." : "The run goes on; this page follows it.";
  live.hidden = false;
  if (!state.done || state.version !== version) setTimeout(ask, 3000);
}

ask();
