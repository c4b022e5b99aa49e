"""The report: what the table says, and a page that stands alone whatever it is given."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from lightning_mue.calibration import Decoded, certify, propose, simulate
from lightning_mue.calibration.losses import retention_losses
from lightning_mue.policy import Certificate, ExitPolicy, ExitRule
from lightning_mue.report import Row, print_table, table_markdown, write_html
from lightning_mue.report.depths import sample_depths
from lightning_mue.report.frontier import used_of
from tests.calibration.conftest import build_trace, latency  # noqa: F401

ROWS = [
    Row("transformers", 0.7, 80.0, 101.0, 1.0, None, {"vision": 12.0, "decoder": 6.0}),
    Row("exits | all", 0.69, 30.25, 44.0, 0.381, 0.02, {"vision": 3.2, "decoder": 1.25}, "certified", chosen=True),
    Row("not run", note="no time"),
]
CERTIFICATE = Certificate("certified", "exact_match", 0.98, 0.95, 900, 300, 0.0123, method="betting on cluster means")


class Page(HTMLParser):
    """Collects tags, attributes and the text outside styles; notes a tag closed that was not open."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def calibrated(latency):  # noqa: F811
    """Propose on one made-up trace, test on another."""
    trace, fresh = build_trace(n=600), build_trace(n=600, seed=5)
    proposal = propose(trace, latency, "accuracy", 0.95, 0.95)

    def decode(policy):
        found = simulate(fresh, policy, latency)
        return Decoded(fresh.sample_ids, fresh.clusters, found.score, found.same)

    policy, tests = certify(
        proposal.chain,
        decode,
        metric="accuracy",
        keep=0.95,
        confidence_level=0.95,
        seed=0,
        clusters=fresh.clusters,
        full_score_mean=0.7,
    )
    return proposal, tests, policy, simulate(fresh, policy, latency)


def test_markdown_table():
    lines = table_markdown(ROWS, "exact match").splitlines()
    assert lines[0] == (
        "| variant | exact match | p50 ms | p95 ms | time ratio | vision depth | decoder depth | note |"
    )
    assert lines[2].startswith("| transformers | 0.700 | 80.0 | 101.0 | 1.00 | 12.0 | 6.0 |")
    assert lines[3].startswith("| **exits \\| all** | **0.690** | **30.2** | **44.0** | **0.38 ± 0.01** |")
    assert lines[4] == "| not run | - | - | - | - | - | - | no time |"


def test_columns_in_which_nothing_was_measured_are_left_out():
    lines = table_markdown([Row("a", p50_ms=1.0), Row("b", quality=float("nan"), p50_ms=2.0)]).splitlines()
    assert lines[0] == "| variant | p50 ms |"


def test_console_table_fits_80_columns_and_ends_with_the_promise():
    out = io.StringIO()
    print_table(ROWS, CERTIFICATE, "Scenes", console=Console(file=out, width=80, color_system=None))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    for cell in ("Scenes", "transformers", "0.38 ± 0.01", "3.2/1.2", "101.0"):
        assert cell in text
    assert CERTIFICATE.in_words() in " ".join(text.split())


def test_console_table_without_certificate():
    out = io.StringIO()
    print_table(ROWS[:1], None, "t", "score", Console(file=out, width=100))
    assert "score" in out.getvalue()
    assert "No certificate" in out.getvalue()


def test_the_whole_page_stands_alone(calibrated, tmp_path):
    proposal, tests, policy, found = calibrated
    levels = np.arange(600) % 4 + 1
    path = write_html(
        tmp_path / "sub" / "report.html",
        "Scenes <5 & more>",
        ROWS,
        policy,
        proposal=proposal,
        tests=tests,
        depths=found.depths,
        levels=levels,
        ceiling=Row("first exits", 0.3, 12.0, ratio=0.15),
        settings={"device": "x86_64 CPU", "threads": 1},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    for tag in ("script", "link", "img", "iframe", "object"):
        assert tag not in page.tags
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert "url(http" not in text
    assert "@import" not in text
    for said in (
        "Scenes <5 & more>",
        policy.certificate.in_words(),
        policy.depths_in_words(),
        "full depth",
        "chosen",
        "vision: mean",
        "difficulty level",
        "12.0 ms per sample",
        "x86_64 CPU",
        "38%",
        "of the time of transformers",
    ):
        assert said in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert used | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_same_inputs_give_the_same_bytes(calibrated, tmp_path):
    proposal, tests, policy, found = calibrated
    one, two = (
        write_html(tmp_path / name, "t", ROWS, policy, proposal=proposal, tests=tests, depths=found.depths)
        for name in ("one.html", "two.html")
    )
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("policy", "badge"),
    [
        (ExitPolicy.full_depth(), "not calibrated"),
        (
            ExitPolicy(certificate=Certificate("full depth", "accuracy", 0.9, 0.95, note="Too few samples.")),
            "full depth",
        ),
        (
            ExitPolicy({"decoder": ExitRule.static(1)}, certificate=Certificate("uncertified", "accuracy", 0.9, 0.9)),
            "unc",
        ),
    ],
)
def test_a_page_of_little(policy, badge, tmp_path):
    page = Page(write_html(tmp_path / "report.html", "little", [], policy).read_text(encoding="utf-8"))
    assert badge in page.text
    assert "svg" not in page.tags
    assert not page.open


def test_a_proposal_that_was_not_tested(calibrated, tmp_path):
    proposal, _, _, _ = calibrated
    text = write_html(tmp_path / "r.html", "t", ROWS, ExitPolicy.full_depth(), proposal=proposal).read_text("utf-8")
    assert "none was tested" in text
    assert "full depth, chosen" in text


def test_levels_must_be_of_the_same_samples(tmp_path):
    with pytest.raises(ValueError, match="got 2 for 3 of 'vision'"):
        write_html(
            tmp_path / "r.html",
            "t",
            [],
            ExitPolicy.full_depth(),
            depths={"vision": np.array([1, 2, 2])},
            levels=np.array([1, 2]),
        )


def test_the_loss_a_test_used(calibrated):
    """0 at full depth, 1 where the promise is only just kept: as `propose` counts it, on other data."""
    proposal, tests, _, _ = calibrated
    test, full = tests[0], tests[0].score_full_depth
    expected = (1 - test.score / full) / (1 - proposal.keep)
    assert used_of(test, proposal) == pytest.approx(expected)
    assert test.result.mean_loss == pytest.approx(
        retention_losses(np.array([test.score]), np.array([full]), proposal.keep)[0]
    )


def test_depth_of_a_sample_is_the_mean_over_its_steps():
    assert sample_depths(np.array([[2, 4, 0], [1, 1, 4]])).tolist() == [3.0, 2.0]
    assert sample_depths(np.array([3, 5])).tolist() == [3.0, 5.0]
