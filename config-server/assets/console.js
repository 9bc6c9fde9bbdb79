// What pages do beside their links and forms: times in the viewer's zone, ages that count on, the theme, copying, and when the
// live part of a page is fetched anew. Nothing is asked of the server more often than once a second.
(() => {
  "use strict";
  const REFRESH_EVERY_MIN_MS = 1000;
  const REFRESH_EVERY_MS = 5000;
  // Of the time, the server works for a page at most one part in so many: a large fleet's pages are fetched less often.
  const SHARE = 5;
  const moments = new Intl.DateTimeFormat(undefined, {
    year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
  });
  const full = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
  let clockAhead = 0;

  // The same words as the server's (words.rs).
  function span(ms) {
    ms = Math.max(0, ms);
    const seconds = Math.floor(ms / 1000);
    if (ms < 1000) return `${Math.floor(ms)} ms`;
    if (seconds < 10) return `${(ms / 1000).toFixed(1)} s`;
    if (seconds < 120) return `${seconds} s`;
    if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
    if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
    return `${Math.floor(seconds / 86400)} days`;
  }

  function say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  // Buttons stay as they were when the page was fetched, so that nobody's typing is lost; when they are of another stage of the
  // group's way by now, the page says so.
  function lifecycle() {
    const now = document.querySelector("#live [data-stage]");
    const buttons = document.getElementById("lifecycle");
    if (!now || !buttons) return;
    buttons.querySelector("[data-changed]").hidden = now.dataset.stage === buttons.dataset.stage;
  }

  function localise() {
    const live = document.getElementById("live");
    if (live?.dataset.now) clockAhead = Date.now() - Number(live.dataset.now);
    for (const time of document.querySelectorAll("time[data-moment]")) {
      const date = new Date(time.dateTime);
      say(time, moments.format(date));
      time.title = full.format(date);
    }
    lifecycle();
    count();
  }

  function count() {
    const now = Date.now() - clockAhead;
    for (const time of document.querySelectorAll("time[data-ago]")) {
      const age = now - Number(time.dataset.ago);
      // Tenths of a second would only flicker.
      say(time, age < 10000 ? `${Math.max(0, Math.floor(age / 1000))} s ago` : `${span(age)} ago`);
    }
  }

  function theme() {
    const button = document.getElementById("theme");
    if (!button) return;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const current = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
    const show = () => {
      const other = current() === "dark" ? "light" : "dark";
      button.textContent = other === "dark" ? "☾" : "☀";
      button.setAttribute("aria-label", `Show the ${other} theme`);
      button.title = `Show the ${other} theme`;
      document.dispatchEvent(new Event("theme"));
    };
    button.hidden = false;
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = current() === "dark" ? "light" : "dark";
      try { localStorage.setItem("seawall-theme", document.documentElement.dataset.theme); } catch { /* this page only */ }
      show();
    });
    dark.addEventListener("change", show);
    show();
  }

  async function copy(button) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch {
      // No right to the clipboard: what is selected can be copied by hand.
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = before; }, 2000);
  }

  function live() {
    const part = document.getElementById("refresh");
    if (!part || !document.getElementById("live")?.hasChildNodes()) {
      part?.remove();
      return;
    }
    const unreachable = document.getElementById("unreachable");
    let began = Date.now(), took = 0, busy = false, waiting = 0, stream = null;
    // The live part is fetched `after` so long from its last time, or as soon as it may be.
    const refresh = (after) => {
      clearTimeout(waiting);
      const wait = Math.max(after, took * SHARE);
      waiting = setTimeout(() => {
        if (!document.hidden && !busy) {
          busy = true;
          began = Date.now();
          part.dispatchEvent(new Event("happened"));
        }
        refresh(REFRESH_EVERY_MS);
      }, Math.max(0, began + wait - Date.now()));
    };
    const happened = () => refresh(REFRESH_EVERY_MIN_MS);
    // A page that nobody sees asks for nothing, and leaves its connection to others.
    const listen = () => {
      if (document.hidden) {
        stream?.close();
        stream = null;
      } else if (!stream) {
        stream = new EventSource(document.body.dataset.stream);
        for (const kind of ["enrolled", "removed", "state", "declared", "job", "access", "message"]) {
          stream.addEventListener(kind, happened);
        }
        happened();
      }
    };
    document.addEventListener("htmx:after:swap", () => {
      took = Date.now() - began;
      localise();
    });
    document.addEventListener("htmx:finally:request", () => { busy = false; });
    document.addEventListener("htmx:error", () => { unreachable.hidden = false; });
    document.addEventListener("htmx:response:error", () => { unreachable.hidden = false; });
    document.addEventListener("htmx:after:request", (event) => {
      if (event.detail.ctx.response.status < 400) unreachable.hidden = true;
    });
    document.addEventListener("visibilitychange", listen);
    addEventListener("pagehide", () => stream?.close());
    listen();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-copy]");
    if (button) copy(button);
  });
  // On a phone the places are wider than the screen.
  document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  // The newest points are at the right.
  const timeline = document.querySelector(".timeline");
  if (timeline) timeline.scrollLeft = timeline.scrollWidth;
  localise();
  setInterval(count, 1000);
  theme();
  live();
})();
