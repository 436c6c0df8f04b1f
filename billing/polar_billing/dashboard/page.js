// Keeps a page up to date that is whole without it, and checks receipts in place. Fetches nothing but this very page.
"use strict";
(() => {
  const EVERY_MS = 1400;
  const state = document.getElementById("state");
  const said = document.getElementById("said");
  const verdicts = new Map();
  let paused = false;

  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Pause";
  state.append(button);

  const load = async (url) => {
    const answer = await fetch(url, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    return new DOMParser().parseFromString(await answer.text(), "text/html");
  };
  const say = (words, kind) => {
    said.className = `lamp ${kind}`;
    if (said.textContent !== words) said.textContent = words;
  };

  // What the reader has done to a section outlives its new figures: focus, scrolled tables, opened details.
  const replace = (section, fresh) => {
    const focused = section.contains(document.activeElement) ? document.activeElement.id : "";
    const scrolled = new Map([...section.querySelectorAll(".scroll")].map((box) => [box.id, [box.scrollLeft, box.scrollTop]]));
    const opened = new Set([...section.querySelectorAll("details[open]")].map((part) => part.id));
    section.replaceChildren(...fresh.childNodes);
    for (const part of section.querySelectorAll("details")) part.open = opened.has(part.id);
    for (const [id, [left, top]] of scrolled) document.getElementById(id)?.scrollTo(left, top);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  };
  const selects = (section) => {
    const selection = getSelection();
    return selection && !selection.isCollapsed && section.contains(selection.anchorNode);
  };
  const shown = new Map([...document.querySelectorAll("[data-live]")].map((section) => [section.id, section.innerHTML]));

  const update = async () => {
    const fresh = await load(location.href.split("#")[0]);
    for (const [id, html] of shown) {
      const [section, other] = [document.getElementById(id), fresh.getElementById(id)];
      if (!other || other.innerHTML === html || selects(section)) continue;
      shown.set(id, other.innerHTML);
      replace(section, other);
    }
    for (const [id, verdict] of verdicts) show(document.getElementById(id), verdict);
    say(`Live, ${fresh.body.dataset.at}`, "");
  };

  const show = (link, verdict) => {
    if (!link) return;
    link.nextElementSibling?.remove();
    const node = document.createElement("span");
    node.className = `verdict ${verdict.good ? "good" : "bad"}`;
    node.textContent = verdict.good ? "verified" : "does not agree";
    link.after(node);
  };
  document.addEventListener("click", async (event) => {
    const link = event.target.closest("a.verify");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    if (verdicts.has(link.id)) return; // the second time it leads to the receipt
    event.preventDefault();
    try {
      const page = await load(link.href);
      const verdict = page.getElementById("verdict");
      verdicts.set(link.id, { good: verdict.dataset.good === "yes" });
      document.getElementById("heard").textContent = verdict.textContent;
      show(document.getElementById(link.id), verdicts.get(link.id));
    } catch {
      location.assign(link.href);
    }
  });

  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    if (paused) say("Paused", "off");
  });
  const again = async () => {
    if (!paused && !document.hidden) {
      try {
        await update();
      } catch (error) {
        say(`Not up to date: ${error.message}`, "bad");
      }
      if (paused) say("Paused", "off");
    }
    setTimeout(again, EVERY_MS);
  };
  document.addEventListener("visibilitychange", () => document.hidden || paused || update().catch(() => {}));
  setTimeout(again, EVERY_MS);
})();
