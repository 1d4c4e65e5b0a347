"""The look of a report: a page of text and figures, light and dark by the reader's setting, and on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1d21; --muted: #595f69; --grid: #e4e6ea; --line: #cdd1d8; --link: #0b57a4; --shade: #f4f5f7;
  --good: #0f6b45; --bad: #a3361c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --ink: #e5e7eb; --muted: #a2a9b5; --grid: #30343b; --line: #454b55; --link: #83b8f0; --shade: #1d2026;
    --good: #63c796; --bad: #f0917a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.4rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.8rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 1.6rem 0 0.4rem; }
p, ul, dl { margin: 0.5rem 0 0.8rem; }
ul { padding-left: 1.3rem; }
li { margin: 0.25rem 0; }
header p { color: var(--muted); margin: 0.15rem 0; }
a { color: var(--link); text-underline-offset: 0.15em; }
a:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
nav { margin: 1.4rem 0 0; padding: 0.6rem 0; border-block: 1px solid var(--line); font-size: 0.93rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; margin: 0; padding: 0; }
nav li { margin: 0; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.4rem 0 1rem; min-width: min(100%, 30rem); }
caption { text-align: left; color: var(--muted); padding-bottom: 0.3rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--grid); }
thead th { border-bottom: 1px solid var(--line); color: var(--muted); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; min-width: 10rem; }
sup, sub { line-height: 0; font-size: 0.78em; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mark { white-space: nowrap; }
.mark.good { color: var(--good); }
.mark.bad { color: var(--bad); }
.mark.plain { color: var(--muted); }
.law { margin: 1.8rem 0; }
.formula { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.88rem; }
.source, .note { color: var(--muted); font-size: 0.9rem; }
figure { margin: 2rem 0 2.6rem; }
figure h3 { margin: 0 0 0.5rem; }
figure svg { display: block; width: 100%; height: auto; fill: currentColor; }
figure svg.narrow { max-width: 40rem; }
figcaption { font-size: 0.92rem; color: var(--muted); max-width: 46rem; }
figcaption p { margin: 0.4rem 0; }
.files { font-size: 0.86rem; }
@media (max-width: 40rem) {
  body { padding: 1rem 0.9rem 3rem; }
  h1 { font-size: 1.4rem; }
  figure svg.wide { min-width: 33rem; }
  figure svg.broad { min-width: 46rem; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --ink: #000000; --muted: #444444; --grid: #dddddd; --line: #999999; --link: #000000; --good: #0f6b45; --bad: #a3361c;
  }
  @page { margin: 18mm 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .files { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, h3 { break-after: avoid; }
  figure, tr, .law li { break-inside: avoid; }
  figure svg { max-height: 17cm; }
  figure svg.narrow { max-height: 8.6cm; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
}
"""
