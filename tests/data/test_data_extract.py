"""From bytes to plain text: charsets, HTML, PDF, and what is broken."""

import io
from pathlib import Path

import pytest
from reportlab.pdfgen.canvas import Canvas

from pensar.base.errors import DataError
from pensar.base.stage import Counts, Runtime
from pensar.data import demo, extract, sources
from pensar.data.demo_pdf import fits_pdf, leaflet
from pensar.data.documents import read_documents
from pensar.data.extract import ExtractConfig, decoded, tidy
from pensar.data.html import page_text
from pensar.data.pdf import paragraphs, pdf_text, without_running_lines
from pensar.data.sources import Source, SourcesConfig

SENTENCE = "The river rises in the hills and runs for a long way through the plain before it meets the sea. "


def extracted(runtime: Runtime, tmp_path: Path, corpus: Path) -> Counts:
    sources.run(SourcesConfig(sources=(Source(name="s", path=str(corpus)),)), {}, tmp_path / "raw", runtime)
    return extract.run(ExtractConfig(), {"raw": tmp_path / "raw"}, tmp_path / "text", runtime)


@pytest.mark.parametrize(
    ("content", "charset", "text"),
    [
        ("Olá, ação".encode(), "", "Olá, ação"),
        ("Olá, ação".encode(), "iso-8859-1", "Olá, ação"),
        ("Olá, ação".encode("latin-1"), "iso-8859-1", "Olá, ação"),
        ("“quoted”".encode("cp1252"), "iso-8859-1", "“quoted”"),
        ("Привет".encode("windows-1251"), "windows-1251", "Привет"),
        ("Привет".encode("utf-16"), "", "Привет"),
        (b"\xef\xbb\xbfmarked", "", "marked"),
        ('<meta charset="koi8-r"><p>Привет'.encode("koi8-r"), "", '<meta charset="koi8-r"><p>Привет'),
        (b"caf\xe9", "no-such-charset", "caf�"),
    ],
)
def test_bytes_are_decoded_as_they_were_meant(content: bytes, charset: str, text: str) -> None:
    assert decoded(content, charset, is_html=True)[0] == text


def test_main_text_is_taken_without_menus_and_footers() -> None:
    links = "".join(f'<li><a href="/{n}">menu entry {n}</a></li>' for n in range(30))
    html = f"""<html lang="pt-BR"><head><title>The  river</title></head><body><nav><ul>{links}</ul></nav>
    <main><h1>The river</h1><p>{SENTENCE * 4}</p><p>{SENTENCE * 3}</p></main><footer>imprint and more</footer></body>"""
    text, marks = page_text(html, 0.3)
    assert text.count("The river rises") == 7
    assert "menu entry" not in text
    assert marks["declared_language"] == "pt-BR"
    assert marks["title"].split() == ["The", "river"]


def test_a_page_that_loses_nearly_all_is_taken_in_full() -> None:
    links = "".join(f'<li><a href="/{n}">entry {n} about something worth a look</a></li>' for n in range(80))
    text, marks = page_text(f"<html><body><ul>{links}</ul><p>End.</p></body></html>", 0.3)
    assert marks["extraction"] == "full"
    assert text.count("entry") == 80


def test_text_is_tidied_and_code_keeps_its_shape() -> None:
    assert tidy("a\r\nb \t\n\n\n\nc\x00\x08 e\u0301\n", keep_indent=False) == "a\nb\n\nc é"
    assert tidy("\n\n    x = 1\r\n\n\n\n    y = 2\n", keep_indent=True) == "    x = 1\n\n\n\n    y = 2"


def test_invalid_utf8_is_repaired_when_little_and_dropped_when_much(tmp_path: Path, runtime: Runtime) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "little.txt").write_bytes((SENTENCE * 5).encode() + b"caf\xe9 is repaired")
    (corpus / "much.txt").write_bytes(b"\xff\xfd\x80\x81 ab" * 100)
    (corpus / "empty.txt").write_bytes(b" \r\n ")
    counts = extracted(runtime, tmp_path, corpus)
    (document,) = read_documents(tmp_path / "text")
    assert document.text.endswith("caf� is repaired")
    assert document.marks["invalid_characters"] == 1
    assert counts["dropped"] == {"empty": 1, "invalid_text": 1}


def test_nothing_but_unreadable_files_is_an_error_with_a_remedy(tmp_path: Path, runtime: Runtime) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "broken.pdf").write_bytes(b"%PDF-1.7 no more than this")
    with pytest.raises(DataError, match=r"broken_pdf.*check the sources"):
        extracted(runtime, tmp_path, corpus)


# ---------------------------------------------------------------- PDF


def test_a_leaflet_comes_back_word_for_word() -> None:
    text = (
        SENTENCE * 18 + "An extraordinarily incomprehensible counterrevolutionary misunderstanding ended it."
    )
    found, marks, problem = pdf_text(leaflet("eng_Latn", {"title": "Chapter one", "text": text}))
    assert problem == ""
    assert marks["pages"] >= 3
    assert (marks["pages_empty"], marks["pages_failed"]) == (0, 0)
    assert found.split() == f"Chapter one {text}".split()


def test_a_pdf_may_declare_its_language() -> None:
    row = {"title": "Title", "text": SENTENCE}
    assert pdf_text(leaflet("hat_Latn", row))[1]["declared_language"] == "hat"
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    canvas.drawString(72, 700, "Nothing is declared here.")
    canvas.save()
    assert "declared_language" not in pdf_text(buffer.getvalue())[1]


def test_a_leaflet_has_the_same_bytes_each_time() -> None:
    row = {"title": "Título", "text": "Água mole em pedra dura. " * 30}
    assert leaflet("por_Latn", row) == leaflet("por_Latn", row)


def test_every_passage_that_goes_to_pdf_comes_back_whole() -> None:
    passages = demo.read_passages(Path(demo.__file__).with_name(demo.PASSAGES))
    for code, rows in passages.items():
        for row in rows if fits_pdf(rows) else ():
            found, marks, _ = pdf_text(leaflet(code, row))
            assert marks["pages"] >= 2, "a running header is told by its being repeated"
            assert "".join(found.split()) == "".join(f"{row['title']}{row['text']}".split()), code


@pytest.mark.parametrize(
    "content", [b"", b"%PDF-1.4", b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog", b"not a pdf at all"]
)
def test_a_broken_pdf_has_a_reason(content: bytes) -> None:
    text, marks, problem = pdf_text(content)
    assert (text, problem) == ("", "broken_pdf")
    assert marks["error"]


def test_a_pdf_without_text_and_pages_without_text_are_reported() -> None:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    canvas.rect(10, 10, 50, 50)
    canvas.showPage()
    canvas.save()
    assert pdf_text(buffer.getvalue())[2] == "pdf_without_text"
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    canvas.showPage()
    canvas.drawString(72, 700, "The second page has words.")
    canvas.showPage()
    canvas.save()
    text, marks, problem = pdf_text(buffer.getvalue())
    assert (text, problem) == ("The second page has words.", "")
    assert (marks["pages"], marks["pages_empty"], marks["empty_pages"]) == (2, 1, "1")


def test_running_lines_go_and_hyphens_are_joined() -> None:
    bodies = [["the first", "page"], ["another", "one"], ["and the", "last"]]
    pages = [["Journal 12", *body, str(number)] for number, body in enumerate(bodies)]
    assert without_running_lines(pages) == bodies
    lines = [
        "a line that is as long as usual, and then an extra-",
        "ordinary word stands at its end, well-known to",
        "all.",
    ]
    assert paragraphs(lines) == " ".join(lines).replace("extra- ordinary", "extraordinary")


def test_a_real_report_gives_its_sentences(shared_data: Path) -> None:
    text, marks, problem = pdf_text((shared_data / "pdf" / "qwen3-technical-report.pdf").read_bytes())
    assert problem == ""
    assert marks["pages"] == 35
    assert marks["pages_failed"] == 0
    assert "119 languages and dialects" in text
    assert len(text) > 50_000
