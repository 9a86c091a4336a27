"""The one style sheet of all pages: light and dark, screen, phone and print."""

from __future__ import annotations

CSS = """
:root{--paper:#fdfdfb;--ink:#1d1f21;--soft:#5c6166;--rule:#d9dad5;--card:#f4f4ef;--teacher:#3d6aa6;--student:#b4561f;
--axis:#8a8f94;--grid:#e6e6e1;--third:#5b8a5a;--fourth:#8a6a9c;--fifth:#1f8a8c;--sixth:#a37c1a;
--seventh:#b5557f;--eighth:#7a5a3c;--alarm:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#16181a;--ink:#e4e4df;--soft:#a2a7ab;--rule:#383c40;--card:#1f2225;
--teacher:#7fa8dd;--student:#e08d57;--axis:#7d8388;--grid:#2b2e31;--third:#8fbf8c;--fourth:#b99acb;--fifth:#5fc4c6;--sixth:#d9b454;
--seventh:#e58fb3;--eighth:#c2a184;--alarm:#f2877f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Charter,"Bitstream Charter","Iowan Old Style",
Palatino,Cambria,Georgia,serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;font-weight:600;margin:0 0 .4rem}
h2{font-size:1.3rem;font-weight:600;margin:3rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;font-weight:600;margin:1.6rem 0 .3rem}
p{margin:.5rem 0;max-width:46em}
.kind{color:var(--soft);margin:0 0 .3rem;font-size:.9rem}
.lead{font-size:1.2rem;line-height:1.45}
.note,figcaption,caption{color:var(--soft);font-size:.88rem;line-height:1.45}
.warn{border-left:3px solid var(--alarm);padding-left:.8rem}
code,pre,table,.key,.cells,.legend,svg{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
pre{background:var(--card);padding:.8rem 1rem;overflow-x:auto;border-radius:4px;line-height:1.45;overflow-wrap:normal}
.keys{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:0 2rem;margin:1.4rem 0 0;padding:0}
.key{border-top:2px solid var(--ink);padding:.5rem 0 1rem}
.key dt{font-size:.85rem;color:var(--soft)}
.key dd{margin:0;font-size:.85rem;color:var(--soft);line-height:1.4}
.key dd.big{font-size:1.9rem;line-height:1.25;color:var(--ink);font-weight:500;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;overflow-wrap:normal;line-height:1.35}
caption{text-align:left;padding-bottom:.4rem;font-family:Charter,"Bitstream Charter","Iowan Old Style",Palatino,
Cambria,Georgia,serif}
th,td{padding:.32rem .9rem .32rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th{font-weight:500}
thead th{color:var(--soft);border-bottom:1px solid var(--ink);vertical-align:bottom}
td,tbody th{max-width:26rem}
.n{text-align:right;white-space:nowrap;padding-right:1.2rem}
thead .n{white-space:normal;min-width:3.6em}
.across{color:var(--soft)}
.wide{width:max-content;max-width:calc(min(100vw,50vw + 560px) - 2.5rem)}
.wide th:first-child{position:sticky;left:0;background:var(--paper)}
.wide tbody th{min-width:11rem;max-width:17rem}
.wide table{font-size:.82rem;border-collapse:separate;border-spacing:0}.wide .n{padding-right:.8rem}
.wide{background:linear-gradient(to left,var(--paper),transparent) right/3rem 100% no-repeat local,
linear-gradient(to left,var(--rule),transparent) right/1.1rem 100% no-repeat scroll}
.verdict{display:inline-block;white-space:nowrap}
.verdict::before{content:"";display:inline-block;width:.6em;height:.6em;border-radius:50%;margin-right:.5em;
background:var(--axis)}
.verdict.yes::before{background:var(--third)}.verdict.no::before{background:var(--alarm)}
tr.total th,tr.total td{border-top:1px solid var(--ink);font-weight:600}
figure{margin:1.2rem 0;min-width:0}
figcaption{margin-top:.4rem;max-width:46em}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 2rem}
.plots figure{margin:.6rem 0}
svg{display:block;width:100%;height:auto;max-width:620px;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.4rem 0;padding:0;
font-size:.8rem;color:var(--soft)}
.legend i{display:inline-block;width:1.1em;height:.22em;margin-right:.4em;vertical-align:middle}
.strips{display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,33rem),1fr));gap:.9rem 1.5rem;margin:1rem 0}
.strips figure{margin:0}
.strips figcaption{margin:0 0 .15rem}
.pair{display:grid;grid-template-columns:4.2rem minmax(0,1fr);align-items:center;gap:.2rem .6rem;
font-size:.8rem;color:var(--soft)}
.pair img,.strip img{display:block;max-width:100%;height:auto;image-rendering:pixelated}
.pair .t{color:var(--teacher)}.pair .s{color:var(--student)}
.strip{display:grid;grid-template-columns:minmax(6rem,13rem) minmax(0,1fr);align-items:center;
gap:.35rem 1rem;font-size:.9rem}
.prompted{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1.1rem .8rem;margin:1rem 0}
.prompted figure{margin:0}.prompted figure div{display:flex;gap:3px}
.prompted img{display:block;width:4.2rem;height:auto;image-rendering:pixelated}
.prompted figcaption{margin-top:.25rem;font-size:.78rem;line-height:1.3;color:var(--soft);overflow-wrap:anywhere}
.cells{border-spacing:2px;border-collapse:separate;font-size:.75rem}
.cells th,.cells td{border:0;padding:.15rem .1rem;text-align:center;min-width:2em;white-space:nowrap}
.cells tbody th,.cells thead th:first-child{text-align:left;padding-right:.8rem}
.cells thead th{color:var(--soft)}
.cells td{background:var(--card);color:var(--soft);border-radius:2px}
.cells td.new{background:var(--student);color:var(--paper)}
details{margin:1rem 0}summary{cursor:pointer}
ul.findings{padding-left:1.2rem;max-width:46em}ul.findings li{margin:.3rem 0}
@media (max-width:600px){body{font-size:16px}.verdict{white-space:normal}
main{padding:1.5rem 1rem 3rem}h1{font-size:1.6rem}
.key dd.big{font-size:1.6rem}
.keys{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:0 1.2rem}
.pair{grid-template-columns:3.4rem minmax(0,1fr)}
.strip{grid-template-columns:minmax(0,1fr)}}
@media print{main{max-width:none}details{display:block}h2{break-after:avoid}figure{break-inside:avoid}}
"""
