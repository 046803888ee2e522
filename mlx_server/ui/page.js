// What the page does in the browser by itself. Everything else is in Python.
"use strict";
window.mlx = (() => {
  const CHAT = "mlx-server/chat/", KEY = "mlx-server/key", CHOICE = "mlx-server/choice/";

  function parsed(key) {
    try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
  }

  async function copy(text) {
    if (navigator.clipboard && window.isSecureContext) {
      await navigator.clipboard.writeText(text);
      return;
    }
    // Plain HTTP from another machine has no clipboard.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (button) {
      await copy(button.closest(".code").querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
      return;
    }
    const link = event.target.closest(".prose a[href]");
    if (link) {
      event.preventDefault();
      window.open(link.href, "_blank", "noopener,noreferrer");
    }
  });

  // A text that grows stays in sight as long as its reader is at its end.
  const END = 80;
  let pinned = new WeakMap();
  document.addEventListener("scroll", (event) => {
    const box = event.target;
    if (box.classList && box.classList.contains("messages")) {
      pinned.set(box, box.scrollHeight - box.scrollTop - box.clientHeight < END);
    }
  }, true);

  return {
    copy,
    key: () => sessionStorage.getItem(KEY) || localStorage.getItem(KEY) || "",
    keepKey: (key, forGood) => {
      sessionStorage.removeItem(KEY);
      localStorage.removeItem(KEY);
      if (key) (forGood ? localStorage : sessionStorage).setItem(KEY, key);
      return true;
    },
    origin: () => location.origin,
    choice: (name) => localStorage.getItem(CHOICE + name),
    choose: (name, value) => { localStorage.setItem(CHOICE + name, value); return true; },
    list: () => Object.keys(localStorage)
      .filter((key) => key.startsWith(CHAT))
      .map((key) => [key, parsed(key)])
      .filter(([, kept]) => kept)
      .map(([key, kept]) => ({ id: key.slice(CHAT.length), title: kept.title, updated: kept.updated }))
      .sort((a, b) => b.updated - a.updated),
    load: (id) => (parsed(CHAT + id) || {}).data || null,
    save: (id, title, data) => {
      try {
        localStorage.setItem(CHAT + id, JSON.stringify({ title, updated: Date.now(), data }));
        return true;
      } catch { return false; }
    },
    remove: (id) => { localStorage.removeItem(CHAT + id); return true; },
    place: (path) => history.replaceState(history.state, "", path),
    follow: (force) => {
      for (const box of document.querySelectorAll(".messages")) {
        if (force) pinned.set(box, true);
        if (pinned.get(box) !== false) box.scrollTop = box.scrollHeight;
      }
    },
    focus: (selector) => document.querySelector(selector)?.focus(),
  };
})();
