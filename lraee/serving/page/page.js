"use strict";

// State is the address: ?q=text or ?like=row, so that links and the back button work.

const FIRST = 60, STEP = 120, MOST = 500;
const $ = (id) => document.getElementById(id);
const grid = $("grid"), viewer = $("viewer");
let results = [], shown = FIRST, turn = 0, opened = -1;

function fromAddress() {
  const parameters = new URLSearchParams(location.search);
  return { q: (parameters.get("q") || "").trim(), like: parameters.get("like") };
}

function go(parameters) {
  const text = new URLSearchParams(parameters).toString();
  history.pushState(null, "", text ? `/?${text}` : "/");
  shown = FIRST;
  window.scrollTo(0, 0);
  search();
}

async function get(address) {
  const response = await fetch(address, { headers: { Accept: "application/json" } });
  const value = await response.json().catch(() => null);
  if (!response.ok) {
    const error = new Error(value?.error?.message || `the server answered ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return value;
}

async function search() {
  const mine = ++turn, { q, like } = fromAddress(), started = performance.now();
  const parameters = new URLSearchParams({ k: shown });
  if (like !== null) parameters.set("like", like); else if (q) parameters.set("q", q);
  $("query").value = q;
  grid.classList.add("waiting");
  try {
    const answer = await get(`/search?${parameters}`);
    if (mine !== turn) return;
    results = answer.results;
    show(q, like, answer, performance.now() - started);
  } catch (error) {
    if (mine === turn) fail(error);
  } finally {
    if (mine === turn) grid.classList.remove("waiting");
  }
}

function milliseconds(value) {
  return value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`;
}

function count(number) {
  return `${number.toLocaleString("en")} photo${number === 1 ? "" : "s"}`;
}

function show(q, like, answer, total) {
  $("title").textContent = like !== null ? "More like this" : q || "Photos";
  document.title = q ? `${q} · Search photos` : "Search photos";
  const parts = [count(results.length)];
  if (answer.text_ms) parts.push(`text ${milliseconds(answer.text_ms)}`);
  if (answer.search_ms) parts.push(`search ${milliseconds(answer.search_ms)}`);
  if (q || like !== null) parts.push(`in all ${milliseconds(total)}`);
  $("status").textContent = parts.join(" · ");
  $("like").hidden = like === null;
  if (like !== null) {
    $("like-image").src = `/thumbnails/${Number(like)}`;
    $("like-name").textContent = answer.like ? baseName(answer.like.name) : "";
  }
  grid.replaceChildren(...results.map(tile));
  grid.hidden = !results.length;
  $("more").hidden = results.length < shown || shown >= MOST;
  notice(results.length ? null : ["No photos here", "The index is empty: embed some photos, then start the server again."]);
}

function baseName(name) {
  return name.slice(name.lastIndexOf("/") + 1);
}

function tile(result, place) {
  const item = $("tile").content.firstElementChild.cloneNode(true);
  const [open, similar, score] = item.children, image = open.firstElementChild;
  const ratio = result.width && result.height ? result.width / result.height : 1.5;
  item.style.setProperty("--ratio", Math.min(3, Math.max(0.5, ratio)).toFixed(4));
  image.alt = baseName(result.name);
  image.addEventListener("load", () => image.classList.add("loaded"));
  image.addEventListener("error", () => item.classList.add("missing"));
  image.src = `/thumbnails/${result.row}`;
  open.title = result.name;
  open.addEventListener("click", () => view(place));
  similar.addEventListener("click", () => go({ like: result.row }));
  score.textContent = result.score === null ? "" : result.score.toFixed(3);
  return item;
}

function notice(texts, { retry = false, login = false } = {}) {
  $("notice").hidden = !texts;
  $("retry").hidden = !retry;
  $("login").hidden = !login;
  if (texts) [$("notice-title").textContent, $("notice-text").textContent] = texts;
}

function fail(error) {
  const { q, like } = fromAddress();
  $("title").textContent = like !== null ? "More like this" : q || "Photos";
  results = [];
  grid.replaceChildren();
  $("status").textContent = "";
  $("more").hidden = true;
  $("like").hidden = true;
  if (error.status === 401) {
    notice(["A token is needed", "It is in the file that the server was started with."], { login: true });
    $("token").focus();
  } else if (error.status === 429 || error.status >= 500) {
    notice(["The server is busy", `The answer: ${error.message}.`], { retry: true });
  } else if (error.status) {
    notice(["That cannot be searched for", `The answer: ${error.message}.`]);
  } else {
    notice(["The server does not answer", "Is “lraee serve” still running?"], { retry: true });
  }
}

// One photo, large

function view(place) {
  const result = results[place];
  if (!result) return;
  opened = place;
  $("photo").src = `/photos/${result.row}`;
  $("photo").alt = baseName(result.name);
  const size = result.width && result.height ? ` · ${result.width} × ${result.height}` : "";
  $("caption").textContent = `${result.name}${size}`;
  $("previous").hidden = place === 0;
  $("next").hidden = place === results.length - 1;
  if (!viewer.open) viewer.showModal();
}

viewer.addEventListener("close", () => {
  $("photo").removeAttribute("src");
  grid.children[opened]?.firstElementChild.focus();
});
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
$("close").addEventListener("click", () => viewer.close());
$("previous").addEventListener("click", () => view(opened - 1));
$("next").addEventListener("click", () => view(opened + 1));
$("viewer-like").addEventListener("click", () => likeOpened());

function likeOpened() {
  const { row } = results[opened];
  viewer.close();
  go({ like: row });
}

// Keys

function focused() {
  const item = document.activeElement?.closest("#grid li");
  return item ? [...grid.children].indexOf(item) : -1;
}

function below(place, direction) {
  const box = grid.children[place].getBoundingClientRect(), middle = box.left + box.width / 2;
  const rows = [...grid.children].map((each, index) => ({ index, box: each.getBoundingClientRect() }))
    .filter(({ box: other }) => direction > 0 ? other.top > box.bottom - 1 : other.bottom < box.top + 1);
  const near = direction > 0 ? Math.min(...rows.map(({ box: b }) => b.top)) : Math.max(...rows.map(({ box: b }) => b.top));
  return rows.filter(({ box: b }) => Math.abs(b.top - near) < 2)
    .sort((a, b) => Math.abs(a.box.left + a.box.width / 2 - middle) - Math.abs(b.box.left + b.box.width / 2 - middle))[0]?.index;
}

function move(place, key) {
  const steps = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: results.length - 1 };
  const target = key in steps ? steps[key] : below(place, key === "ArrowDown" ? 1 : -1);
  if (target === undefined && key === "ArrowUp") $("query").focus();
  const button = grid.children[target]?.firstElementChild;
  button?.focus();
  button?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (viewer.open) {
    if (event.key === "ArrowLeft") view(opened - 1);
    else if (event.key === "ArrowRight") view(opened + 1);
    else if (event.key === "m") likeOpened();
    return;
  }
  if (event.target instanceof HTMLInputElement) {
    if (event.key === "ArrowDown" && grid.children.length) { event.preventDefault(); move(-1, "ArrowRight"); }
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const place = focused();
  if (event.key === "/") { event.preventDefault(); $("query").focus(); $("query").select(); }
  else if (event.key === "Escape" && (fromAddress().q || fromAddress().like !== null)) go({});
  else if (place >= 0 && event.key === "m") go({ like: results[place].row });
  else if (place >= 0 && /^(Arrow|Home$|End$)/.test(event.key)) { event.preventDefault(); move(place, event.key); }
});

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const q = $("query").value.trim();
  go(q ? { q } : {});
});
$("like-clear").addEventListener("click", () => go({}));
$("retry").addEventListener("click", () => search());
$("more").addEventListener("click", () => { shown = Math.min(MOST, shown + STEP); search(); });
$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = JSON.stringify({ token: $("token").value });
  const response = await fetch("/login", { method: "POST", body }).catch(() => null);
  $("token").value = "";
  if (response?.ok) start(); else $("notice-text").textContent = "That is not the token.";
});
window.addEventListener("popstate", () => { shown = FIRST; search(); });

async function start() {
  search();
  const about = await get("/library").catch(() => null);
  if (about) $("about").textContent = `${count(about.photos)} · ${about.model}`;
}
start();
