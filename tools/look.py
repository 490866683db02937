"""Open every page of a built site in Chromium and report what its reader cannot see whole.

Usage: python tools/look.py [_build/html] [--pages 09 notation] [--widths 1280 820 390] [--dark] [--access] [--pictures FOLDER]

A page is shown in a frame of each width. Reported: code, formulas, tables and outputs that are wider than their place, pages that
are wider than the screen, and figures whose letters are too small (11 pixels, on a phone 9) and that cannot be enlarged. With --access,
axe-core judges each page: `make axe` fetches it, or AXE_CORE names its file. With --pictures the first screens of each page are written as PNG files,
of each width, and with --dark as a reader sees them who has chosen the dark mode.
A second table says of the widest view how a page looks to who scrolls, in screens of 800 pixels: whether a picture is in the first one, how
many there are to a picture, and how long the longest run of code is, without words, outputs or pictures between. A chapter with less
to see than RHYTHM allows is a fault; those in EXCEPTIONS are known, and their limits may only come nearer to the others'.
Chromium must be on the path; nothing else is needed: the pages are served by Python, and the frame sends back what it measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
KINDS = ("code", "formulas", "tables", "outputs", "figures")
GRAVE = ("serious", "critical")
WIDEST = 1280  # pixels: the view whose rhythm is judged
RHYTHM = {"screens a picture": 3.0, "screens of code": 1.0}  # the most that a chapter may have
EXCEPTIONS = {  # as they are, rounded up; "late": no picture in the first screen
    "nbs/16_vae.html": {"screens a picture": 4.0},
    "nbs/20_text_conditioning.html": {"screens a picture": 4.0},
    "nbs/26_scaling.html": {"screens a picture": 4.5},
    "nbs/27_performance.html": {"screens a picture": 4.1},
    "nbs/28_diffusers.html": {"screens a picture": 3.3},
    "nbs/29_own_captions.html": {"screens a picture": 4.8},
    "nbs/30_command_line.html": {"screens a picture": 4.5},
    "nbs/90_errata.html": {"screens a picture": 3.5},
    "nbs/91_checks.html": {"late": True, "screens a picture": 23.5},
    "nbs/93_files.html": {"late": True, "screens a picture": 16.5},
    "nbs/94_names.html": {"late": True},
    "nbs/95_progress.html": {"late": True},
    "nbs/96_precision.html": {"late": True},
}
AXE = Path(__file__).resolve().parent / "node_modules" / "axe-core" / "axe.min.js"
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<script>
const pages = PAGES, widths = WIDTHS, dark = DARK, access = ACCESS, found = [];
const selectors = {
  code: "div.highlight pre", formulas: "div.math mjx-container[display=true], div.math",
  tables: ".bd-article table", outputs: "div.cell_output div.output, div.cell_output pre",
};
// what scrolls with a fading edge says that there is more
const wider = e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && !e.closest(".scrolls") && !e.querySelector(".scrolls");
const LETTER = 8 * 110 / 72;  // pixels: the least letters of a figure, 8 points, at the size for which it was drawn
const letters = image => LETTER * image.clientWidth / image.getAttribute("width");
const SCREEN = 800;
// words, formulas, tables, outputs and pictures end a run of code; what is folded, and its label, does not
const BREAKS = "p, li, table, div.math, div.cell_output, img, canvas, h2, h3, h4";
function scrolled(inside) {
  const article = inside.document.querySelector(".bd-article");
  if (!article) return null;
  const box = e => e.getBoundingClientRect(), start = box(article).top, top = -box(inside.document.documentElement).top;
  const seen = e => e.checkVisibility() && box(e).height > 1;
  const pictures = [...article.querySelectorAll("img, canvas")].filter(e => seen(e) && box(e).width >= 100 && box(e).height >= 40);
  const isCode = e => e.matches("div.highlight");
  const parts = [...article.querySelectorAll(`div.highlight, ${BREAKS}`)].filter(e => seen(e) && !e.closest("summary")
    && (isCode(e) ? !e.closest("div.cell_output") : !e.closest("div.highlight")));
  let run = null, heading = "", longest = [0, ""];
  for (const part of parts) {
    if (!isCode(part)) { run = null; if (part.matches("h2, h3, h4")) heading = part.firstChild.textContent; continue; }
    run ??= box(part).top;
    const length = (box(part).bottom - run) / SCREEN;
    if (length > longest[0]) longest = [length, heading];
  }
  const screens = box(article).height / SCREEN;
  const soon = pictures.some(e => (box(e).top + box(e).bottom) / 2 + top < SCREEN);
  return { screens, soon, pictures: pictures.length, code: longest };
}
async function judge(inside) {
  const script = inside.document.createElement("script");
  script.src = "/axe.min.js";
  inside.document.head.append(script);
  await new Promise((done, fail) => { script.onload = done; script.onerror = () => fail("axe-core cannot be read"); });
  const { violations } = await inside.axe.run(inside.document, { resultTypes: ["violations"] });
  return violations.map(({ id, impact, nodes }) => [impact, id, nodes.length, nodes[0].html.slice(0, 120)]);
}
const wait = ms => new Promise(done => setTimeout(done, ms));
async function measure(page, width) {
  localStorage.setItem("mode", dark ? "dark" : "light");
  localStorage.setItem("theme", dark ? "dark" : "light");
  const frame = document.createElement("iframe");
  frame.style.cssText = `border:0; width:${width}px; height:${SCREEN}px`;
  frame.src = page;
  document.body.replaceChildren(frame);
  await new Promise(done => frame.onload = done);
  const inside = frame.contentWindow;
  if (inside.MathJax && inside.MathJax.startup) await inside.MathJax.startup.promise;
  const lazy = inside.MathJax && inside.MathJax.startup && inside.MathJax.startup.document;
  if (lazy && lazy.lazyTypesetAll) await lazy.lazyTypesetAll();  // those below the screen, too
  await inside.document.fonts.ready;
  await wait(50);
  const row = {page, width};
  for (const [kind, selector] of Object.entries(selectors)) {
    const all = [...inside.document.querySelectorAll(selector)];
    row[kind] = [all.filter(wider).length, all.length];
  }
  const root = inside.document.documentElement;
  row.page_too_wide = Math.max(0, root.scrollWidth - width);
  const figures = [...inside.document.querySelectorAll(".bd-article img[width][class*=on-]")];
  const shown = figures.filter(image => image.clientWidth && !image.closest(".sd-card"));
  row.letters = shown.map(letters);
  const small = image => letters(image) < (width < 576 ? 9 : 11) && !image.closest(".enlarges");
  row.figures = [shown.filter(small).length, shown.length];
  row.scrolled = scrolled(inside);
  if (access) row.access = await judge(inside);
  return row;
}
(async () => {
  for (const page of pages) for (const width of widths) {
    try { found.push(await measure(page, width)); }
    catch (error) { found.push({page, width, error: String(error)}); }
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""

# put into a page: once all is loaded and laid out, run a script there and send what it returns
SENDER = """<script>
addEventListener("load", async () => {
  const frame = () => new Promise(done => requestAnimationFrame(done));
  let answer;
  try {
    await document.fonts.ready;
    for (let i = 0; i < 3; i++) await frame();  // who watches sizes is told of them after a frame
    answer = { found: await (async () => { SCRIPT })() };
  } catch (error) { answer = { error: String(error) }; }
  await fetch("/found", { method: "POST", body: JSON.stringify(answer) });
});
</script>"""


# a page in a frame: a window cannot be as narrow as a phone, and what the reader chose is set before the page is there
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<script>
localStorage.setItem("mode", MODE);
localStorage.setItem("theme", MODE);
const frame = document.createElement("iframe");
frame.style.cssText = "border:0; width:WIDTHpx; height:HEIGHTpx";
frame.src = PAGE;
document.body.append(frame);
</script>"""


class Pages(SimpleHTTPRequestHandler):
    """Serve the site, the measuring page, and take what it found."""

    harness, found, done = "", None, None

    def do_GET(self):
        """Send the measuring page, axe-core, or a file of the site."""
        if self.path not in ("/look.html", "/axe.min.js"):
            return super().do_GET()
        is_page = self.path == "/look.html"
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if is_page else "text/javascript")
        self.end_headers()
        self.wfile.write(type(self).harness.encode() if is_page else find_axe().read_bytes())

    def do_POST(self):
        """Keep what the page measured."""
        type(self).found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        type(self).done.set()

    def log_message(self, *_):
        """Say nothing about requests."""


class Quiet(ThreadingHTTPServer):
    """Do not report a browser that leaves a page before all of it has come."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """Be silent about closed connections."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def find_browser():
    """Return the path of Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def find_axe():
    """Return the path of axe-core, or None."""
    path = Path(os.environ.get("AXE_CORE") or AXE)
    return path if path.is_file() else None


def grave_faults(row):
    """List what axe-core calls serious or critical on a page."""
    faults = (fault for fault in row["access"] if fault[0] in GRAVE)
    return [f"{rule} ({impact}), {n} times: {text}" for impact, rule, n, text in faults]


def chromium(*options, profile):
    """List the command that starts Chromium without a window."""
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    common += ["--disable-background-networking", "--no-first-run"]
    return [find_browser(), *common, f"--user-data-dir={profile}", *options]


@contextmanager
def served(folder, harness=""):
    """Serve a folder, and a text as look.html beside it, while the context lasts; give who answers, and the address."""
    asked = type("Asked", (Pages,), {"harness": harness, "done": threading.Event()})
    server = Quiet(("127.0.0.1", 0), partial(asked, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield asked, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(folder, page, *options, harness="", timeout=1200):
    """Open a page of a folder in Chromium and return the JSON that it sends to /found, however slow the machine is."""
    with ExitStack() as stack:
        asked, address = stack.enter_context(served(folder, harness))
        profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        command = chromium(*options, "--remote-debugging-port=0", f"{address}/{page}", profile=profile)
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ends = time.monotonic() + timeout
            while not asked.done.wait(0.2):
                if browser.poll() is not None:
                    raise RuntimeError(f"the browser ended with {browser.returncode} before it had answered")
                if time.monotonic() > ends:
                    raise TimeoutError(f"the browser did not answer within {timeout} s")
        finally:
            browser.terminate()
            browser.wait()
    return asked.found


def run_script(folder, text, script, *options, timeout=120):
    """Show a text as a page of a folder, run a script there and return what it returns; a script that fails is told."""
    Path(folder, "page.html").write_text(text + SENDER.replace("SCRIPT", script), encoding="utf-8")
    answer = ask(folder, "page.html", *options, timeout=timeout)
    if "error" in answer:
        raise RuntimeError(f"the script in the page failed: {answer['error']}")
    return answer["found"]


def measure(site, pages, widths, dark=False, access=False, timeout=3600):
    """Measure pages at each width; return a row for each."""
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(widths))
    text = text.replace("DARK", json.dumps(dark)).replace("ACCESS", json.dumps(access))
    return ask(site, "look.html", f"--window-size={max(widths) + 20},1000", harness=text, timeout=timeout)


def picture(site, page, width, height, out, dark=False):
    """Write the first screens of a page as a PNG file, in the mode that a reader has chosen."""
    mode = json.dumps("dark" if dark else "light")
    text = FRAME.replace("MODE", mode).replace("PAGE", json.dumps(f"/{page}"))
    text = text.replace("WIDTH", str(width)).replace("HEIGHT", str(height))
    with served(site, text) as (_, address), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [f"--window-size={max(width, 500)},{height}", f"--screenshot={Path(out).resolve()}"]
        command = chromium(*options, "--virtual-time-budget=20000", f"{address}/look.html", profile=profile)
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def rhythm_faults(page, seen):
    """List what a chapter shows too little of to who scrolls, beyond what is known of it."""
    if not page.startswith("nbs/"):
        return []
    allowed = RHYTHM | EXCEPTIONS.get(page, {})
    ratio = seen["screens"] / max(1, seen["pictures"])
    faults = [] if seen["soon"] or allowed.get("late") else ["no picture in the first screen"]
    if round(ratio, 1) > allowed["screens a picture"]:
        faults.append(f"{ratio:.1f} screens a picture, {allowed['screens a picture']} allowed")
    length, place = seen["code"]
    if round(length, 1) > allowed["screens of code"]:
        faults.append(f"{length:.1f} screens of code in {place!r}, {allowed['screens of code']} allowed")
    return faults


def tell_scrolling(rows):
    """List, as lines of a table, how the pages of one width look to who scrolls, and which are the worst."""
    rows = [row for row in rows if row.get("scrolled")]
    lines = [f"{'page':34} {'screens':>8} {'picture at once':>16} {'screens a picture':>18} {'longest code':>13}"]
    each = {row["page"]: row["scrolled"] for row in rows}
    for page, seen in each.items():
        share = f"{seen['screens'] / seen['pictures']:.1f}" if seen["pictures"] else "no picture"
        length, place = seen["code"]
        lines.append(f"{page:34} {seen['screens']:8.1f} {'yes' if seen['soon'] else 'no':>16} {share:>18} {length:13.1f}  {place if length > 1 else ''}".rstrip())
    chapters = {page: seen for page, seen in each.items() if page.startswith("nbs/")} or each
    late = [page for page, seen in chapters.items() if not seen["soon"]]
    sparse = sorted(chapters, key=lambda page: -chapters[page]["screens"] / max(1, chapters[page]["pictures"]))
    coded = sorted(chapters, key=lambda page: -chapters[page]["code"][0])
    lines += ["", f"no picture at once: {', '.join(late) or 'none'}"]
    return [*lines, f"fewest pictures: {', '.join(sparse[:5])}", f"longest code: {', '.join(coded[:5])}"]


def is_bad(row):
    """Tell whether a view has a fault of any kind."""
    if "error" in row or row["page_too_wide"] or any(row[kind][0] for kind in KINDS):
        return True
    if row["width"] == WIDEST and row["scrolled"] and rhythm_faults(row["page"], row["scrolled"]):
        return True
    return "access" in row and bool(grave_faults(row))


def list_pages(site, wanted=()):
    """List the site's pages whose path holds one of the wanted words."""
    pages = sorted(str(p.relative_to(site)) for p in Path(site).rglob("*.html"))
    pages = [p for p in pages if not p.startswith(("_static", "_modules", "_sources"))]
    return [p for p in pages if not wanted or any(word in p for word in wanted)]


def main(arguments=None):
    """Measure, print a table, and end with 1 if something is cut."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", default="_build/html")
    parser.add_argument("--pages", nargs="*", default=())
    parser.add_argument("--widths", nargs="*", type=int, default=[1280, 820, 390])
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--access", action="store_true")
    parser.add_argument("--pictures")
    options = parser.parse_args(arguments)
    if find_browser() is None:
        sys.exit(f"none of {', '.join(NAMES)} is on the path")
    pages = list_pages(options.site, options.pages)
    if not pages:
        sys.exit(f"no pages in {options.site}: build the book first (make book)")
    if options.access and find_axe() is None:
        sys.exit(
            f"axe-core is not at {AXE}: make axe, or name its axe.min.js in AXE_CORE"
        )
    rows = measure(options.site, pages, options.widths, options.dark, options.access)
    print(
        f"{'page':34} {'width':>6}   code cut   formulas    tables   outputs   figures  page over by  least letters"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['page']:34} {row['width']:6}   {row['error']}")
            continue
        cut = "".join(f"{row[kind][0]:6}/{row[kind][1]:<4}" for kind in KINDS)
        least = f"{min(row['letters']):8.1f} px" if row["letters"] else ""
        print(f"{row['page']:34} {row['width']:6} {cut} {row['page_too_wide']:6} px {least}".rstrip())
        for fault in grave_faults(row) if options.access else ():
            print(f"    {fault}")
    print("", *tell_scrolling([row for row in rows if row["width"] == max(options.widths)]), sep="\n")
    for row in rows:
        if row["width"] == WIDEST and row.get("scrolled"):
            for fault in rhythm_faults(row["page"], row["scrolled"]):
                print(f"{row['page']}: {fault}")
    for page in pages if options.pictures else ():
        Path(options.pictures).mkdir(parents=True, exist_ok=True)
        for width in options.widths:
            name = f"{Path(page).stem}-{width}{'-dark' * options.dark}.png"
            picture(options.site, page, width, 2000, Path(options.pictures, name), options.dark)
    bad = [row for row in rows if is_bad(row)]
    print(f"\n{len(bad)} of {len(rows)} views have faults")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
