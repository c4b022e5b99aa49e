"""The look of the page. Okabe and Ito's colours: told apart by colour-blind readers, in light and in dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1c1d1f; --muted: #5c6168; --line: #d5d8dc;
  --good: #0067a5; --bad: #bb4a00; --tint: #0067a50f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e8e9eb; --muted: #a0a6ae; --line: #3a3f46;
    --good: #6cbcf0; --bad: #f0904a; --tint: #6cbcf017;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 var(--sans);
  -webkit-text-size-adjust: 100%; }
main { max-width: 50rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 1.5rem;
  text-wrap: balance; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 3rem 0 .75rem; }
p { margin: 0 0 1rem; }
.promise { border-left: 4px solid var(--good); background: var(--tint); padding: 1rem 1.25rem; margin: 0 0 2rem; }
.promise.weak { border-color: var(--muted); }
.promise p:first-of-type { font-size: 1.1rem; }
.promise p:last-child { margin: 0; color: var(--muted); font-size: .92rem; }
.badge { display: inline-block; font-size: .78rem; font-weight: 650; letter-spacing: .06em; text-transform: uppercase;
  color: var(--good); margin-bottom: .35rem; }
.weak .badge { color: var(--muted); }
.headline { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 0 0 1rem; }
.headline div { max-width: 14rem; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.headline dt { color: var(--muted); font-size: .88rem; }
.headline dd { margin: 0; font-size: 2rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 -1.25rem .75rem; padding: 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .45rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; }
td:first-child { min-width: 9rem; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tr.chosen td { font-weight: 650; }
tr.chosen td:first-child { color: var(--good); }
figure { margin: 0 0 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; }
figure svg.narrow { display: none; }
figcaption, .small { color: var(--muted); font-size: .88rem; line-height: 1.5; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: .5rem 0; padding: 0;
  font-size: .88rem; color: var(--muted); }
.key svg { display: inline-block; width: 12px; height: 12px; margin-right: .35rem; vertical-align: -1px; }
dl.setting { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0; font-size: .92rem; }
dl.setting dt { color: var(--muted); }
dl.setting dd { margin: 0; overflow-wrap: anywhere; }
.shown { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.75rem 2rem;
  list-style: none; margin: 1.5rem 0 0; padding: 0; }
.shown li { display: flex; gap: 1rem; break-inside: avoid; }
.shown li > div { min-width: 0; }
.shown img { flex: none; width: 6rem; height: 6rem; object-fit: contain; object-position: top;
  image-rendering: pixelated; }
.shown p { margin: 0 0 .25rem; overflow-wrap: anywhere; }
.shown .small { font-size: .82rem; }
.prompt { line-height: 1.35; }
.answer { line-height: 1.75; white-space: pre-wrap; }
.token { padding: .1em .2em; border-radius: .25em; margin-right: 1px; color: #000; print-color-adjust: exact; }
.legend .token { padding: .1em .5em; }
.token sub { font-size: .62em; margin-left: .15em; line-height: 0; font-variant-numeric: tabular-nums; }
.right { color: var(--good); } .wrong { color: var(--bad); }
@media (max-width: 40rem) {
  figure svg.wide { display: none; }
  figure svg.narrow { display: block; }
  dl.setting { gap: .3rem 1rem; }
}
@media print { body { font-size: 11pt; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""
