"""certificate.html: a certificate (extras/certificate.py) as a page to print, two sides of A4, that loads nothing."""

import html

from kit.text import visible

BEGIN = "<!doctype html><html lang=en><title>Certificate"
LABELS = {
    "el10": "EL10",
    "ma": "MA",
    "bleu": "BLEU",
    "bertscore": "BERTScore F1",
    "entropy": "Entropy (bits)",
}
LABELS |= {
    "el10_spans": "EL10, marked parts",
    "ma_spans": "MA, marked parts",
    "ma_rest": "MA, the rest of their texts",
}
LABELS |= {"secret_said": "a secret is said"}
SIDES = {
    "before": "before",
    "after": "after",
    "never_saw": "never saw them",
    "unseen": "unseen texts",
}
SHOWN, LENGTH = 6, 600  # of a list that may be long, and of a text: certificate.json has all
STYLE = """@page { size: A4; margin: 13mm } body { font: 9pt/1.35 sans-serif; max-width: 184mm; margin: 8mm auto }
h1 { font-size: 16pt; margin: 0 } h2 { font-size: 10.5pt; margin: 3mm 0 1mm; border-bottom: 1px solid #999 }
table { border-collapse: collapse; width: 100% } ul { margin: 0; padding-left: 5mm } section { break-inside: avoid }
td, th { padding: .3mm 3mm .3mm 0; text-align: left; font-weight: 400; vertical-align: top; overflow-wrap: anywhere }
th { width: 38mm; color: #555 } .figures td { white-space: nowrap }
code { font-size: 7pt } @media print { body { margin: 0 } }"""


def render(found):
    """The page of a certificate as bytes; the same dict gives the same bytes."""
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>\n"
        for title, content in sections(found).items()
    )
    head = f"{BEGIN}</title><meta charset=utf-8><style>{STYLE}</style>"
    page = (
        f"{head}\n<h1>Certificate of a run</h1><p><b>{text(found['what'])}</b></p>\n{body}</html>\n"
    )
    return page.encode("utf-8", "backslashreplace")


def sections(found):
    """{title: HTML}, in the order of the page."""
    request, scope, model, code, method = (
        found[n] for n in ("request", "scope", "model", "code", "method")
    )
    limits = {
        LABELS.get(name, name): limit
        for name, limit in method["thresholds"].items()
        if limit is not None
    }
    settings = {name: value for name, value in found["configuration"].items() if value is not None}
    return {
        "Request": table({
            "Request ids": few(request["ids"]), "Received": request["received"], "Done": request["done"],
            "Approved by": request["approved_by"],
        }),
        "Scope": table({
            "Texts": scope["texts"], "Texts of earlier requests, measured too": scope.get("watched"),
            "sha256 of the pairs": fixed(scope["pairs_sha256"]), "Salt": fixed(scope["salt"]),
            "Hashes (HMAC-SHA256)": scope["hashes_note"] or few(scope["hashes"], fixed),
        }),
        "What was done": table({
            "Method": f"{method['method']}, {method['protocol']} protocol, seed {method['seed']}",
            "Ended": f"{method['stopped']}, epoch {method['epochs']}" + "; the model COLLAPSED" * method["collapsed"],
            "Thresholds": ", ".join(f"{name} {limit:g}" for name, limit in limits.items()),
            "Settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
            "Model": f"{model['name']} {model['revision'] or ''}",
            "sha256 before": fixed(model["sha256_before"]), "sha256 after": fixed(model["sha256_after"]),
            "Code (git)": fixed(code["git"]), "sha256 of the method": fixed(code["method_sha256"]),
            "Versions": ", ".join(f"{name} {version}" for name, version in (code["versions"] or {}).items()),
            "sha256 of the files": few([f"{sha} {name}" for name, sha in found["files"].items()], fixed),
        }),
        "Figures: the mean over the texts and its 95% bootstrap interval": figures(found["figures"]),
        "Residual risk: what this model still gives away is": bullets(found["residual_risk"]),
        "Audit": bullets(found["audit"]),
        "Tasks": bullets([f"{when}: {cells(averages)}" for when, averages in found["tasks"].items()]),
        "Not tested": bullets(found["not_tested"]),
        "Copies that this does not reach": bullets(found["not_reached"]),
        "Signature": table({"Signed by": fixed(found["signed_by"]), "sha256": fixed(found["sha256"])}),
    }  # fmt: skip


class Html(str):
    """A text that has been escaped."""


def text(value):
    """A value as HTML; of None, and of nothing, that it is not known."""
    if isinstance(value, Html):
        return value
    value = visible(str("" if value is None else value)).strip() or "not given"
    return Html(html.escape(value if len(value) <= LENGTH else value[:LENGTH] + " ..."))


def fixed(value):
    """In a fixed width, as hashes are."""
    return value and Html(f"<code>{text(value)}</code>")


def few(values, show=text):
    """The first of a list, a line each, and how many more there are."""
    more = [f"and {len(values) - SHOWN} more, in certificate.json"] if len(values) > SHOWN else []
    return Html("<br>".join([*(text(show(value)) for value in values[:SHOWN]), *more]))


def table(rows):
    return Html(
        "<table>" + "".join(f"<tr><th>{text(k)}<td>{text(v)}" for k, v in rows.items()) + "</table>"
    )


def bullets(values):
    return Html(
        "<ul>"
        + "".join(f"<li>{text(value)}" for value in values[: 2 * SHOWN] or ["not measured"])
        + "</ul>"
    )


def cells(averages):
    """The averages of tasks.json in words."""
    return ", ".join(
        f"{name} {value:.3f}" for name, value in averages.items() if isinstance(value, float | int)
    )


def figures(found):
    """The table of figures."""
    rows = [Html("<tr><th>" + "".join(f"<th>{side}" for side in SIDES.values()))]
    for name, sides in found.items():
        shown = "".join(f"<td>{text(figure(sides.get(side)))}" for side in SIDES)
        n = (sides["after"] or {}).get("n")
        label = LABELS.get(name, name.replace("ppl_", "perplexity ")) + (f", n = {n}" if n else "")
        rows.append(f"<tr><th>{text(label)}{shown}")
    return Html("<table class=figures>" + "".join(rows) + "</table>")


def figure(found):
    """0.123 [0.101, 0.140]; of one that was not measured a dash."""
    if found is None:
        return "-"
    spread = f" [{found['low']:.3f}, {found['high']:.3f}]" if found.get("low") is not None else ""
    return f"{found['value']:.3f}{spread}"
