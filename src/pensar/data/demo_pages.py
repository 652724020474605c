"""HTML pages of the demonstration corpus: the Python language reference as a web site, with what the web adds."""

import html
import re

from pensar.base.files import seed_of

Page = tuple[str, int, str, bytes]
"""URL, HTTP status, content type, body."""

SITE = "https://reference.example.org"
HTML = "text/html; charset=utf-8"
UNDERLINE = re.compile(r"^([*=\-~^])\1{2,}$")
BULLET = re.compile(r"^\* ")
SYNONYMS = {"must": "has to", "may": "can", "used": "employed", "given": "supplied", "returns": "gives back"}
EVERY_WORD = 3
"""One in so many of the words with a synonym is replaced in a near-duplicate."""


def reference_pages(max_topics: int, near_duplicates: int, seed: int) -> list[Page]:
    """Pages of the reference in alphabetical order, then mirrors with small edits, a copy, and junk."""
    from pydoc_data import topics

    names = sorted(topics.topics)[:max_topics]
    texts = {name: topics.topics[name] for name in names}
    pages = [_page(f"/topics/{name}.html", name, topic_html(texts[name]), names) for name in names]
    long = sorted(
        (name for name in names if len(texts[name]) > 2_000), key=lambda name: seed_of(seed, "mirror", name)
    )
    for name in long[:near_duplicates]:
        pages.append(
            _page(
                f"/mirror/near-duplicate/{name}.html", f"{name} (mirror)", topic_html(edited(texts[name])), []
            )
        )
    if long:
        pages.append(_page(f"/mirror/copy/{long[0]}.html", long[0], topic_html(texts[long[0]]), names))
    return pages + junk_pages(names)


def topic_html(text: str) -> str:
    """Headings, paragraphs, lists and indented blocks of a plain-text topic as HTML."""
    parts: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if len(lines) >= 2 and UNDERLINE.match(lines[1].strip()):
            level = {"*": 1, "=": 2, "-": 3}.get(lines[1].strip()[0], 4)
            parts.append(f"<h{level}>{html.escape(lines[0].strip())}</h{level}>")
            lines = lines[2:]
        if not lines:
            continue
        escaped = [html.escape(line, quote=False) for line in lines]
        if all(line.startswith("   ") for line in lines):
            parts.append("<pre>" + "\n".join(line[3:] for line in escaped) + "</pre>")
        elif BULLET.match(lines[0]):
            items = re.split(r"\n\* ", "\n" + "\n".join(escaped))
            parts.append(
                "<ul>" + "".join(f"<li>{' '.join(item.split())}</li>" for item in items if item) + "</ul>"
            )
        else:
            parts.append(f"<p>{' '.join(' '.join(escaped).split())}</p>")
    return "\n".join(parts)


def edited(text: str) -> str:
    """The text as a careless mirror has it: some words replaced, nothing else."""
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return SYNONYMS[match[0]] if count % EVERY_WORD == 0 else match[0]

    return re.sub(rf"\b({'|'.join(SYNONYMS)})\b", replace, text)


def junk_pages(names: list[str]) -> list[Page]:
    """Pages that a filter has to recognise; each address names the kind of junk."""
    links = "".join(
        f'<li><a href="https://shop{n}.example.com/offers">www.shop{n}.example.com</a></li>'
        for n in range(120)
    )
    slogan = "<p>Buy cheap watches online today, best price guaranteed!</p>" * 60
    filler = (
        "<p>Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt.</p>"
        * 4
    )
    cookies = "<p>This site uses cookies. See our cookie policy, privacy policy and terms of use.</p>"
    contact = (
        "<p>Questions about these pages are answered by the editors. Write to docs.team@python-reference.dev or to "
        "webmaster@python-reference.dev, and name the page that you mean and the version that you have read.</p>"
        "<p>The mirror in Lisbon has the address 193.136.2.17 and is copied every night from the main site. "
        "If a page looks older than it should, then please wait for a day and try it again.</p>"
    )
    return [
        _page("/junk/link-farm.html", "Partner links", f"<ul>{links}</ul>", []),
        _page("/junk/repeated.html", "Offers", slogan, []),
        _page("/junk/lorem-ipsum.html", "Coming soon", filler, []),
        _page("/junk/cookie-banner.html", "Privacy", cookies * 3, []),
        _page("/private/contact.html", "Contact", contact, names),
        (f"{SITE}/junk/empty.html", 200, HTML, b"<!doctype html><html><body></body></html>"),
        (f"{SITE}/junk/not-found.html", 404, HTML, b"<html><body><h1>Not Found</h1></body></html>"),
        (f"{SITE}/junk/pixel.gif", 200, "image/gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
        (
            f"{SITE}/junk/broken-utf8.html",
            200,
            HTML,
            b"<html><body><p>" + b"\xc3\x28\xa0\xa1 " * 200 + b"</p></body></html>",
        ),
    ]


def _page(path: str, title: str, body: str, names: list[str]) -> Page:
    """A page with navigation, main part and footer, as sites have them."""
    links = "".join(f'<li><a href="/topics/{name}.html">{html.escape(name)}</a></li>' for name in names[:40])
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} - Language reference</title></head>
<body>
<nav class="navigation"><a href="/">Home</a> <a href="/search">Search</a><ul>{links}</ul></nav>
<main><article>
{body}
</article></main>
<footer class="footer"><p>Pages of the Python language reference. <a href="/license">License</a></p></footer>
</body></html>
"""
    return f"{SITE}{path}", 200, HTML, text.encode()
