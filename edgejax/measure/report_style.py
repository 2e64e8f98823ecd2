"""The style sheet of ``report.html``: light and dark, wide and narrow."""

STYLE = """
:root{--bg:#f6f7f9;--panel:#fff;--ink:#1b2430;--soft:#5b6675;--line:#dfe3e9;--train:#2f6fde;--held:#c2570c;
--c0:#2f6fde;--c1:#d9730d;--c2:#148f64;--c3:#8a4fd3;--c4:#8791a0;--c5:#c6cdd6}
@media(prefers-color-scheme:dark){:root{--bg:#11151b;--panel:#1a2029;--ink:#e6eaf0;--soft:#9aa6b5;--line:#2c3541;
--train:#6ea2ff;--held:#ffa14f;--c0:#6ea2ff;--c1:#ffa14f;--c2:#3fc993;--c3:#b78bf5;--c4:#7c8796;--c5:#434e5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 3rem}
header{margin-bottom:1.25rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:0 0 .75rem}
h3{font-size:.75rem;letter-spacing:.04em;text-transform:uppercase;color:var(--soft);margin:0 0 .25rem}
.over{margin:0;color:var(--soft);font-size:.8rem;letter-spacing:.06em;text-transform:uppercase}
.sub,.note,figcaption,small{color:var(--soft);font-size:.85rem}
.sub{margin:.35rem 0 0}
section,.card{background:var(--panel);border:1px solid var(--line);border-radius:10px}
section{padding:1.1rem 1.25rem;margin-top:1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem}
.card{padding:.8rem 1rem}
.card p{margin:0}
.card .name{color:var(--soft);font-size:.85rem}
.card .value{font-size:1.6rem;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}
figure{margin:0}
figcaption{margin-top:.25rem}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.85rem;margin-bottom:.6rem}
.key span::before{content:"";display:inline-block;margin-right:.45rem;vertical-align:middle}
.k-train::before{width:1.2rem;height:3px;border-radius:2px;background:var(--train)}
.k-held::before{width:.65rem;height:.65rem;border-radius:50%;background:var(--held)}
.plot{position:relative;height:17rem;margin:0 .5rem 1.75rem 2.75rem;border-left:1px solid var(--line);
border-bottom:1px solid var(--line)}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}
.raw{stroke:var(--train);stroke-width:1;opacity:.35}
.mean{stroke:var(--train);stroke-width:2.25}
.held{stroke:var(--held);stroke-width:1.5;stroke-dasharray:4 4}
.plot i{position:absolute;width:.65rem;height:.65rem;margin:-.325rem 0 0 -.325rem;border-radius:50%;
background:var(--held);border:2px solid var(--panel)}
.ty,.tx{position:absolute;font-size:.75rem;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.ty{right:100%;padding-right:.5rem;transform:translateY(-50%)}
.tx{top:100%;padding-top:.35rem;transform:translateX(-50%)}
.bar{display:block;width:100%;height:2rem;border-radius:6px;overflow:hidden;margin-bottom:.75rem}
.bar rect{stroke:var(--panel);stroke-width:2;vector-effect:non-scaling-stroke}
.p0{fill:var(--c0);background:var(--c0)}.p1{fill:var(--c1);background:var(--c1)}.p2{fill:var(--c2);background:var(--c2)}
.p3{fill:var(--c3);background:var(--c3)}.p4{fill:var(--c4);background:var(--c4)}.p5{fill:var(--c5);background:var(--c5)}
.swatch{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin-right:.5rem;vertical-align:-1px}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.3rem .75rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
tbody:last-child tr:last-child>*,tfoot tr>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;font-size:.8rem}
th[scope=row]{font-weight:500}
th small{display:block;font-weight:400;padding-left:1.25rem}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pairs th{width:13rem;color:var(--soft);font-weight:400}
.pairs+.pairs{margin-top:1rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem}
details{margin-top:.75rem;font-size:.9rem}
summary{cursor:pointer;color:var(--soft)}
article+article{margin-top:1.25rem}
.prompt{margin:0 0 .5rem;font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.75rem}
.pair pre{margin:0;padding:.7rem .8rem;background:var(--bg);border:1px solid var(--line);border-radius:8px;
white-space:pre-wrap;overflow-wrap:anywhere}
@media(max-width:40rem){.pair{grid-template-columns:1fr}section{padding:1rem .9rem}.pairs th{width:42%}.plot{height:13rem;margin-left:2.25rem}h1{font-size:1.4rem}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""
