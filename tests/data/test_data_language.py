"""Languages: the table, scripts, declarations, and the detector against declared texts of the world."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pensar.base.errors import ConfigError
from pensar.base.stage import Runtime
from pensar.data import demo, language
from pensar.data.documents import read_documents
from pensar.data.language import Detector, LanguageConfig, language_table
from pensar.data.scripts import dominant_script, han_variant, script_histogram
from pensar.text.document import Document

ENGLISH = "The river rises in the hills and runs for a long way through the plain before it meets the sea."
PORTUGUESE = "O rio nasce na serra e corre por um longo caminho através da planície antes de chegar ao mar."
SERBIAN = "Ђорђе је љубитељ књига и каже да ће његова кућа бити школа. Код нас свако зна шта је џем од шљива."
TRADITIONAL = "這條河從山上流下來，經過很長的平原，最後流進大海。沿岸的人們靠捕魚和種稻為生，學校也在河邊。"
SIMPLIFIED = "这条河从山上流下来，经过很长的平原，最后流进大海。沿岸的人们靠捕鱼和种稻为生，学校也在河边。"
JAPANESE = (
    "この川は山から流れ出て、長い平野を通り、最後に海に注ぎます。岸辺の人々は魚をとって暮らしています。"
)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(LanguageConfig())


def test_the_table_holds_119_languages_with_distinct_codes() -> None:
    rows = language_table()
    assert len(rows) == 119
    assert len({row.code for row in rows}) == 119
    assert all(re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}", row.code) for row in rows)
    assert sum(not row.label for row in rows) == 20


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (ENGLISH, "eng_Latn"),
        (PORTUGUESE, "por_Latn"),
        (SERBIAN, "srp_Cyrl"),
        (TRADITIONAL, "zho_Hant"),
        (SIMPLIFIED, "zho_Hans"),
        (JAPANESE, "jpn_Jpan"),
        ("1234 5678 " * 10, "und"),
        ("too short", "und"),
        ("", "und"),
    ],
)
def test_languages_are_told(detector: Detector, text: str, code: str) -> None:
    assert detector.detect(text)[0] == code


def test_the_histogram_counts_letters_of_each_script() -> None:
    assert script_histogram("abcd абвг 1234!") == {"Latn": 0.5, "Cyrl": 0.5}
    assert dominant_script(script_histogram("漢字とかな")) == "Jpan"
    assert dominant_script(script_histogram("한국어 텍스트")) == "Hang"
    assert dominant_script({}) == "Zyyy"
    assert (han_variant("国家学习"), han_variant("國家學習")) == ("Hans", "Hant")


@pytest.mark.parametrize(
    ("stated", "code"),
    [
        ("por_Latn", "por_Latn"),
        ("pt", "por_Latn"),
        ("pt-BR", "por_Latn"),
        ("en_US", "eng_Latn"),
        ("sw", "swh_Latn"),
        ("fao", "fao_Latn"),
        ("zh-CN", "zho_Hans"),
        ("tlh", None),
    ],
)
def test_declarations_in_many_forms_name_one_language(
    detector: Detector, stated: str, code: str | None
) -> None:
    assert detector.declared(stated, "汉字") == code


def test_declarations_are_kept_and_their_fate_is_counted(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Callable[..., Document]
) -> None:
    faroese = "Áin rennur úr fjøllunum og langan veg gjøgnum slættan áðrenn hon kemur út í sjógvin."
    documents = [
        make(ENGLISH, "agreed", marks={"declared_language": "en"}),
        make(ENGLISH, "differed", marks={"declared_language": "fra_Latn"}),
        make(faroese, "no label", marks={"declared_language": "fao_Latn"}),
        make(PORTUGUESE, "silent"),
        make(PORTUGUESE, "unknown", marks={"declared_language": "tlh"}),
        make("def f(): return 1", "code", kind="code"),
        make("Last digit: 3+4\n7", "task", kind="task", marks={"declared_language": "eng_Latn"}),
    ]
    counts = language.run(LanguageConfig(), {"documents": store(documents)}, tmp_path / "out", runtime)
    found = {document.locator: document for document in read_documents(tmp_path / "out")}
    assert {name: document.language for name, document in found.items()} == {
        "agreed": "eng_Latn",
        "differed": "eng_Latn",
        "no label": "fao_Latn",
        "silent": "por_Latn",
        "unknown": "por_Latn",
        "code": "zxx",
        "task": "eng_Latn",
    }
    assert counts["declarations"] == {"accepted": 2, "agreed": 1, "differed": 1, "none": 2, "unknown": 1}
    assert counts["disagreements"] == {"fra_Latn>eng_Latn": 1}
    assert found["differed"].marks["declared_language"] == "fra_Latn"


def test_a_declaration_decides_between_near_relatives_only(
    detector: Detector, make: Callable[..., Document]
) -> None:
    def fate(text: str, declared: str) -> tuple[str, str]:
        document = make(text, "one", marks={"declared_language": declared})
        outcome = detector.label(document)
        return outcome, document.language

    norwegian = "Elva renner gjennom byen, og om våren kan man høre vannet fra alle husene ved torget."
    assert fate(norwegian, "nob_Latn") == ("agreed", "nob_Latn")
    assert fate(norwegian, "nn") == ("accepted", "nno_Latn")
    assert fate(norwegian, "de") == ("differed", "nob_Latn")
    assert fate(TRADITIONAL, "yue") == ("accepted", "yue_Hant")
    assert fate(TRADITIONAL, "ja") == ("differed", "zho_Hant")


def test_every_passage_of_a_declared_language_is_believed(
    detector: Detector, make: Callable[..., Document]
) -> None:
    passages = demo.read_passages(Path(demo.__file__).with_name(demo.PASSAGES))
    for code, rows in passages.items():
        for row in rows:
            document = make(row["text"], row["title"], marks={"declared_language": code})
            assert detector.label(document) in {"agreed", "accepted"}, (code, document.marks)
            assert document.language == code


def test_a_model_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"language.model .* does not exist; leave it empty"):
        Detector(LanguageConfig(model=str(tmp_path / "none.ftz")))


def test_the_detector_knows_the_declared_texts_of_most_languages(
    shared_data: Path, detector: Detector
) -> None:
    from pensar.data.html import page_text

    files = {
        "por_Latn": "por_PT",
        "rus_Cyrl": "rus",
        "hin_Deva": "hin",
        "zho_Hant": "cmn_hant",
        "tha_Thai": "tha",
    }
    files |= {"kat_Geor": "kat", "heb_Hebr": "heb", "vie_Latn": "vie", "swh_Latn": "swh", "kor_Hang": "kor"}
    for code, name in files.items():
        text, _ = page_text((shared_data / "udhr" / f"{name}.html").read_text("utf-8"), 0.3)
        assert detector.detect(text)[0] == code, name
