"""Style of the page: light and dark, from phones to wide screens, and on paper.

The colours of nodes are those of Okabe and Ito ("Color Universal Design", 2008), which people tell
apart however they see colours, made darker or lighter for contrast with the page.
"""

from __future__ import annotations

# {name: (light, dark)}
COLORS = {
    "page": ("#ffffff", "#14171a"),
    "card": ("#f3f5f7", "#1e2327"),
    "text": ("#1a1d21", "#e6e9ec"),
    "soft": ("#525a63", "#a9b2bb"),
    "line": ("#c5ccd3", "#40474f"),
    "used": ("#8b949e", "#7d8790"),
    "n0": ("#0072b2", "#56a8e0"),
    "n1": ("#d55e00", "#f08a3c"),
    "n2": ("#009e73", "#2fc79a"),
    "n3": ("#b3609a", "#dd97c6"),
    "n4": ("#4d3fa3", "#a79bf0"),
    "n5": ("#9a7400", "#f0d44c"),
    "n6": ("#7f2f1d", "#d4785f"),
    "n7": ("#3f5f0f", "#a7cc5c"),
}

RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
 font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:76rem;margin:auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .25rem}
p{margin:.4rem 0}
.verdict{font-weight:600}
small,dt,caption,.legend{color:var(--soft);font-size:.85rem}
article{background:var(--card);border:1px solid var(--line);border-radius:.4rem;
 padding:.75rem;margin:.75rem 0}
.cards{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}
.cards article{margin:0}
.cards p{font-size:.9rem}
dl{display:grid;grid-template-columns:4.5rem minmax(0,1fr);gap:.2rem .5rem;margin:0}
dd{margin:0}
dd p{margin:0}
code{display:block;white-space:pre-wrap;background:var(--page);border:1px solid var(--line);
 border-radius:.25rem;padding:.25rem .5rem;font:.9rem/1.4 ui-monospace,monospace}
table{width:100%;table-layout:fixed;border-collapse:collapse;margin:.75rem 0}
caption{text-align:left;padding:.25rem 0}
th,td{text-align:left;vertical-align:top;padding:.35rem .5rem .35rem 0;
 border-top:1px solid var(--line);font-weight:400}
th:first-child{width:36%}
thead th{color:var(--soft);font-size:.85rem;border:0}
th small{display:block}
.g{display:grid;gap:.25rem .75rem;
 grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr))}
.k{display:block}
.k small{display:block;line-height:1.3}
.s{display:block;width:100%;height:.8rem;margin-top:.3rem;border:1px solid var(--line)}
.absent,svg.s,.dot.absent{background:repeating-linear-gradient(135deg,var(--line) 0 1px,
 transparent 1px 6px)}
.lanes svg.s{background:none}
path.absent{fill:none}
.light{opacity:.55}
.dot{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;vertical-align:-.05rem;
 border:1px solid var(--line)}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.25rem 1rem}
details{border-top:1px solid var(--line)}
details table{margin:0 0 1rem 1rem;width:calc(100% - 1rem)}
summary{cursor:pointer;padding:.35rem 0}
summary{list-style:none}
summary::-webkit-details-marker{display:none}
summary b{font-weight:400;font-size:.9rem}
.bars{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);gap:.5rem}
@media (min-width:48rem){summary:has(.bars){display:grid;grid-template-columns:36% 64%}}
summary b::before{content:"\\25b8  "}
details[open]>summary b::before{content:"\\25be  "}
.wide{overflow-x:auto}
.matrix{width:auto;table-layout:auto}
.matrix caption{white-space:nowrap}
.matrix th,.matrix td{text-align:right;padding:.25rem .5rem;min-width:2.5rem;border:0}
.matrix tbody th{white-space:nowrap}
.far0{background:none}
.far1{background:color-mix(in srgb,var(--used) 18%,transparent)}
.far2{background:color-mix(in srgb,var(--used) 32%,transparent)}
.far3{background:color-mix(in srgb,var(--used) 46%,transparent)}
:focus-visible{outline:2px solid var(--n0)}
@media print{main{max-width:none;padding:0}article,tr{break-inside:avoid}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def _variables(which: int) -> str:
    return ";".join(f"--{name}:{pair[which]}" for name, pair in COLORS.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}"
    + RULES
    + "".join(
        f".{name}{{background:var(--{name});fill:var(--{name})}}\n"
        for name in (*(f"n{i}" for i in range(8)), "used")
    )
    + ".unknown{background:var(--soft);fill:var(--soft)}\n"
)
