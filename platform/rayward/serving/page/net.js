// Requests to this service, relative to where the page lies, with the key of this tab.
const SECRET = "rayward-key";
let secret = sessionStorage.getItem(SECRET) || "";

class ServiceError extends Error {
  constructor(status, detail) {
    super(detail.message || `the service answered with status ${status}`);
    this.status = status;
    this.detail = detail;
  }
}

async function call(path, body, signal) {
  const headers = {};
  if (secret) headers.authorization = `Bearer ${secret}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ServiceError(0, { code: "unreachable", message: "the service does not answer", remedy: "it may be starting, or the network is away" });
  }
  let content = null;
  try {
    content = await reply.json();
  } catch {
    // A proxy's own page; the status says enough.
  }
  if (reply.ok && content !== null) return content;
  const detail = (content && content.error) || {};
  throw new ServiceError(reply.status, typeof detail === "object" ? detail : { message: String(detail) });
}

function askForKey() {
  const dialog = $("keys");
  if (dialog.open) return;
  $("secret").value = "";
  dialog.returnValue = "";
  dialog.showModal();
}

function keyDialog(changed) {
  $("keys").addEventListener("close", () => {
    const given = $("secret").value.trim();
    const asked = $("keys").returnValue;
    $("secret").value = "";
    if (asked === "use" && given) sessionStorage.setItem(SECRET, (secret = given));
    else if (asked === "forget") sessionStorage.removeItem(SECRET), (secret = "");
    else return;
    changed();
  });
  // Enter in the field is a click on the first button of the form, which is not the one that is meant.
  $("secret").addEventListener("keydown", (event) => {
    if (event.key === "Enter") event.preventDefault(), $("keys").close("use");
  });
  $("key").addEventListener("click", askForKey);
}
