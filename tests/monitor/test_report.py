import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from fake_run import make_run

from maxpretrain.errors import UserError
from maxpretrain.monitor.plots import thin
from maxpretrain.monitor.record import Record, smooth
from maxpretrain.monitor.report import write_report
from maxpretrain.monitor.verdict import notes, trend, verdict

# Attributes that make a browser fetch something.
FETCHING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping", "manifest"}


class Page(html.parser.HTMLParser):
    """Elements, text and ids of a page; fails on elements that are not closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.styles = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] in ("style", "script") else self.words).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    return directory, write_report([directory])


def assert_self_contained(text):
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img", "image", "foreignobject")
        assert not FETCHING & set(attributes), (tag, attributes)
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"(https?:)?//[a-z]", text.replace("// ", ""), flags=re.I)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert "".join(reference) in ids
    return page


def test_the_page_is_whole_small_and_self_contained(quickstart):
    directory, path = quickstart
    assert path == directory / "report.html"
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 200_000
    page = assert_self_contained(text)
    headings = [
        word
        for word in page.words
        if word in ("Curves", "Samples", "Config", "Environment", "Where the time went", "Log")
    ]
    assert headings == ["Curves", "Where the time went", "Samples", "Config", "Environment", "Log"]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert str(directory) not in text  # nothing of this machine but what environment.json says


def test_the_verdict_is_at_the_top(quickstart):
    expected = (
        "Trained 3.1 M parameters on 2.5 M tokens in 2 min 32 s; validation loss 4.94 (1.90 bits per byte), "
        "22 % below the bigram baseline; still improving at the end."
    )
    assert verdict(Record.read(quickstart[0])) == expected
    page = Page(quickstart[1].read_text(encoding="utf-8"))
    assert page.text.index(expected) < page.text.index("Validation loss")


def test_the_charts_are_one_svg_for_light_and_dark(quickstart):
    text = quickstart[1].read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(drawings) == 8  # the loss twice, for wide and narrow screens
    for drawing in drawings:
        colors = set(re.findall(r"(?:stroke|fill):\s*([^;\"]+)", drawing)) | set(
            re.findall(r'(?:stroke|fill)="([^"]+)"', drawing)
        )
        assert colors <= {"none", "#ffffff", "#000000"} | {c for c in colors if c.startswith("var(--")}
        assert not re.search(r"#(?:000000|ffffff)(?![^>]*opacity: ?0)", drawing)
        assert "<text" in drawing
    labels = [a["aria-label"] for tag, a in Page(text).elements if tag == "svg"]
    assert labels[0].startswith("Loss: training from 7.987 at step 5 to 4.923 at step 600; ")
    assert labels[0].endswith(
        "validation from 6.172 at step 60 to 4.935 at step 600; unigram at 8.216; bigram at 6.318"
    )
    for name in set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--key", "--state"}:
        assert f"{name}: light-dark(" in text or name in ("--sans", "--mono")


def test_samples_are_escaped_and_the_latest_comes_first(quickstart):
    text = quickstart[1].read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<b>is not</b>" not in text
    assert "&lt;b&gt;is not&lt;/b&gt; open &amp; ready" in text
    assert text.count("<script>") == 1
    steps = re.findall(r"<summary>Step (\d+)", text)
    assert steps == ["600", "540", "480", "420", "360", "300", "240", "180", "120", "60"]
    assert re.findall(r"<details open>", text) == ["<details open>"]
    assert "6 earlier evaluations" in text
    # The prompt stands once before its text, also where the text repeats it.
    assert '<span class="prompt">The </span>The function returns' in text


def test_the_ledger_adds_up_to_the_wall_time(quickstart):
    run = Record.read(quickstart[0])
    assert {part: round(seconds, 2) for part, seconds in run.ledger.items()} == {
        "prepare": 4.1, "compile": 6.1, "train": 124.74, "data_wait": 1.26, "evaluate": 14.0, "save": 0.5, "other": 1.3,
    }  # fmt: skip
    assert round(run.wall, 2) == 152.0
    assert "training 2 min 5 s 82.1 %" in Page(quickstart[1].read_text(encoding="utf-8")).text


def test_config_marks_what_differs_from_the_defaults(quickstart):
    text = quickstart[1].read_text(encoding="utf-8")
    marked = re.findall(
        r'<tr class=changed><th scope="row">([^<]+)</th><td>([^<]+)<span class="default">default ([^<]+)<', text
    )
    assert ("schedule.warmup", "60", "100") in marked
    assert ("num_layers", "4", "12") in marked
    assert ("max_length", "128", "1024") in marked
    assert not {"b1", "name", "root", "type"} & {name for name, _, _ in marked}
    assert "maxpretrain train configs/quickstart.py --name &#x27;a run&#x27;" in text


def test_diverged(tmp_path):
    run = Record.read(make_run(tmp_path / "r", status="diverged", until=340, nan_from=310))
    assert verdict(run) == (
        "Diverged at step 340 of 600: trained 3.1 M parameters on 1.4 M tokens in 1 min 30 s; "
        "last validation loss 5.08 (1.95 bits per byte), 20 % below the bigram baseline."
    )
    assert notes(run)[0].startswith("The run diverged")
    page = assert_self_contained(write_report([run.directory]).read_text(encoding="utf-8"))
    assert "7 non-finite values are left out." in page.text


def test_overfitting(tmp_path):
    run = Record.read(make_run(tmp_path / "r", overfit=0.6))
    assert trend(run) == "overfitting"
    assert verdict(run).endswith(
        "; overfitting: the validation loss rose from its best, 5.08 at step 300, to 5.54 at the end, while the training loss fell."
    )


def test_resumed_and_waiting_for_data(tmp_path):
    run = Record.read(make_run(tmp_path / "r", resumed_at=240, status="stopped", until=420, data_wait=0.13))
    assert verdict(run).startswith(
        "Stopped at step 420 of 600: trained 3.1 M parameters on 1.7 M tokens in 1 min 57 s; "
    )
    assert notes(run) == [
        "The device waited for data 13 % of the training time; raise data.prefetch, or give it more cores.",
        "The run was resumed once; times below are of all sessions together.",
    ]
    assert [record["step"] for record in run.metrics] == list(range(5, 421, 5))
    assert sum(run.ledger.values()) == pytest.approx(run.wall)
    assert "times below" in Page(write_report([run.directory]).read_text(encoding="utf-8")).text


def test_a_killed_session_s_end_is_in_the_ledger(tmp_path):
    directory = make_run(tmp_path / "r", until=5, status=None, evaluate_every=0)
    with (directory / "events.jsonl").open("a") as file:
        file.write('{"event": "ledger", "time": 1700000009, "step": 5, "seconds": {"train": 3.0, "other": 6.0}}\n')
        file.write('{"event": "checkpoint", "time": 1700000030, "step": 5, "seconds": 0.1}\n')
    run = Record.read(directory)
    assert run.status == "unfinished"
    assert run.ledger == {"train": 3.0, "other": 6.0, "unrecorded": 21.0}
    assert "not recorded" in Page(write_report([directory]).read_text(encoding="utf-8")).text


def test_a_run_that_has_just_begun(tmp_path):
    one_point = make_run(tmp_path / "one", until=5, status=None, evaluate_every=0)
    assert verdict(Record.read(one_point)).startswith(
        "Unfinished, at step 5 of 600: trained 3.1 M parameters on 20.5 k tokens in "
    )
    assert verdict(Record.read(one_point)).endswith("; training loss 8.00, never evaluated.")
    assert_self_contained(write_report([one_point]).read_text(encoding="utf-8"))

    for name in ("metrics.jsonl", "log.txt", "environment.json"):
        (one_point / name).unlink()
    assert verdict(Record.read(one_point)) == "Unfinished, at step 0 of 600; no step has been logged yet."
    (one_point / "events.jsonl").unlink()
    assert verdict(Record.read(one_point)) == "Not trained yet: nothing has been logged."
    assert_self_contained(write_report([one_point]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("value", ["NaN", "Infinity", 0.0, 1e300, None, "text", [1]])
def test_any_value_may_stand_in_the_metrics(tmp_path, value):
    directory = make_run(tmp_path / "r", until=20, status=None, evaluate_every=0)
    keys = ("train/loss", "eval/loss", "eval/bits_per_byte", "train/grad_norm", "train/learning_rate", "train/x")
    with (directory / "metrics.jsonl").open("a") as file:
        for step in range(25, 60, 5):
            file.write(json.dumps({"step": step, **dict.fromkeys(keys, value)}) + "\n")
    assert_self_contained(write_report([directory]).read_text(encoding="utf-8"))


def test_names_and_texts_cannot_break_the_page(tmp_path):
    directory = make_run(tmp_path / "r", until=60, status=None)
    config = json.loads((directory / "config.json").read_text())
    config["name"] = "</title><script>x</script>\"'&"
    config["new\x00field"] = {"<i>": ["<u>", {"a": None}]}
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "sample", "step": 61, "prompt": "\x1b[31m", "text": "\x00\x08 </details> \ud800"})
            + "\n"
        )
    (directory / "log.txt").write_bytes(b"\x1b[31mred\x1b[0m \xff </pre>\n")
    text = write_report([directory]).read_text(encoding="utf-8")
    page = assert_self_contained(text)
    assert text.count("<script>") == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    assert "red \ufffd </pre>" in page.text


def test_objective_metrics_have_charts_of_their_own(tmp_path):
    directory = make_run(tmp_path / "r", until=60, status=None)
    with (directory / "metrics.jsonl").open("a") as file:
        for step in range(65, 120, 5):
            file.write(json.dumps({"step": step, "train/load_balance": 1 + 1 / step, "eval/load_balance": 1.1}) + "\n")
    titles = [
        a["aria-label"].partition(":")[0]
        for tag, a in Page(write_report([directory]).read_text()).elements
        if tag == "svg"
    ]
    assert titles[-1] == "Load balance"


def test_comparison(tmp_path):
    a = make_run(tmp_path / "a", name="first")
    b = make_run(tmp_path / "b", name="second", final_loss=4.6, peak_lr=1e-3, seed=1)
    path = write_report([a, b])
    assert path == tmp_path / "comparison.html"
    text = path.read_text(encoding="utf-8")
    page = assert_self_contained(text)
    assert "second ends lowest: bits per byte 1.803, 5.0 % below first." in page.text
    differing = page.text.partition("Config fields that differ")[2]
    assert differing.startswith(" field first second seed 0 1 optimizer.peak_lr 0.002 0.001 2 runs")
    assert '<td class="number best">1.803</td>' in text
    legend = re.search(r'<ul class="legend">(.*?)</ul>', text)[1]
    assert re.sub("<[^>]+>", " ", legend).split() == ["first", "4.935", "second", "4.688"]
    # The same name twice is told apart; a run with nothing in it does no harm.
    empty = make_run(tmp_path / "c", name="first", until=1, status=None)
    page = assert_self_contained(write_report([a, empty], tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "first (a)" in page.text
    assert "first (c)" in page.text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"there is no run directory .*nothing; give the path of one, or a run's name under runs/"
    ):
        write_report([tmp_path / "nothing"])
    with pytest.raises(
        UserError, match=r"holds no run: config\.json is missing; give a directory that `maxpretrain train` made"
    ):
        write_report([tmp_path])
    with pytest.raises(UserError, match="at least one run"):
        write_report([])
    directory = make_run(tmp_path / "r", until=5, status=None)
    with pytest.raises(UserError, match=r"cannot write .*report\.html: No such file or directory; give another file"):
        write_report([directory], tmp_path / "no" / "report.html")


def test_an_older_report_stays_when_the_new_one_cannot_be_made(tmp_path, monkeypatch):
    directory = make_run(tmp_path / "r", until=5, status=None)
    (directory / "report.html").write_text("old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="make room") as error:
        write_report([directory])
    assert error.value.exit_status == 4
    assert (directory / "report.html").read_text() == "old"
    assert not [p.name for p in directory.iterdir() if p.name.startswith(".")]


def losses(tmp_path, values):
    lines = [json.dumps({"step": 100 * (i + 1), "eval/loss": v, "train/loss": v}) for i, v in enumerate(values)]
    (tmp_path / "config.json").write_text('{"steps": 1000}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return trend(Record.read(tmp_path))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 4.0, 3.5, 3.2, 3.0], "improving"),
        ([5.0, 4.0, 3.01, 3.005, 3.0], "plateau"),
        ([5.0, 4.0, 3.0, 3.2, 3.4], "rising"),
        ([5.0, 4.0, 3.0, 3.0, 3.02], "plateau"),  # 0.7 % above its best is noise
        ([5.0, 4.0, 3.0], "unknown"),
    ],
)
def test_trend(tmp_path, values, expected):
    assert losses(tmp_path, values) == expected


def test_smoothing_keeps_lines_straight_and_takes_noise_away():
    x = np.arange(1.0, 3001.0)
    at, values = smooth(x, 8.0 - 0.002 * x)
    assert len(at) == 400
    assert (at[0], at[-1]) == (1.0, 3000.0)
    np.testing.assert_allclose(values, 8.0 - 0.002 * at, atol=1e-9)  # no lag, no bend at the ends
    noise = np.random.default_rng(0).normal(0, 1, 3000)
    assert smooth(x, noise)[1].std() < 0.2
    assert smooth(x[:2], noise[:2])[1].tolist() == noise[:2].tolist()


def test_thinning_keeps_spikes_and_ends():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[54_321] = 7.0
    kept_x, kept_y = thin(x, y, 500, extremes=True)
    assert len(kept_x) <= 502
    assert kept_y.max() == 7.0
    assert kept_x[-1] == 99_999.0
    assert thin(x, y, 500)[0][[0, -1]].tolist() == [0.0, 99_999.0]


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheme", [0, 1])  # dark, light
def test_a_browser_shows_it(quickstart, tmp_path, scheme):
    from PIL import Image

    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    flags += " --disable-sync --hide-scrollbars --enable-logging=stderr --window-size=1000,1400"
    command = [
        chromium(),
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'shot.png'}",
    ]
    command += [f"--blink-settings=preferredColorScheme={scheme}", quickstart[1].as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert pixels.shape == (1400, 1000, 3)
    assert (pixels[5, 5].mean() < 40) == (scheme == 0)
    background = (np.abs(pixels - pixels[5, 5]).sum(-1) < 12).mean()
    assert 0.1 < background < 0.9
    # The blue training curve and the orange validation curve are there.
    red, blue = pixels[..., 0], pixels[..., 2]
    assert ((blue - red) > 100).sum() > 300
    assert ((red - blue) > 100).sum() > 300
