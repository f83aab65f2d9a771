"""The page of an experiment: seeds become means, sweeps become curves, ratios are paired."""

from __future__ import annotations

import re
import statistics

import pytest
from tests.report.test_page import Page

from trimtab.report import render_experiment
from trimtab.report.experiment import group_arms, ratios, retention_curve
from trimtab.report.rows import arms_of, color_of, duration, label_of, settings_table


@pytest.fixture
def sweep(arm):
    found = []
    for seed, full in enumerate((90, 80)):
        found += [arm("full", full, 100.0 + 100 * seed, seed), arm("pruned", full - 10, 40.0, seed)]
        found += [
            arm("dualspeed", full - 8, 45.0, seed, keep_ratio=0.05),
            arm("dualspeed", full - 4, 50.0 + 50 * seed, seed),
            arm("dualspeed", full, 60.0, seed, keep_ratio=0.25),
            arm("dualspeed", full - 6, 48.0, seed, slow_ratio=0.05),
            arm("dualspeed_no_isolator", full - 5, 50.0, seed, isolator_tokens=0),
        ]
    return found


def test_records_that_differ_only_in_the_seed_are_one_row(sweep):
    groups = group_arms(arms_of(sweep)["scenes"])
    assert [(group.label, len(group.records)) for group in groups] == [
        ("Full tokens", 2), ("Pruned only", 2), ("DualSpeed", 2), ("DualSpeed, keep ratio 0.05", 2),
        ("DualSpeed, keep ratio 0.25", 2), ("DualSpeed, slow ratio 0.05", 2), ("DualSpeed, no isolator", 2),
    ]  # fmt: skip


def test_ratios_are_taken_seed_by_seed(sweep):
    group = next(group for group in group_arms(sweep) if group.label == "DualSpeed")
    assert ratios(group.records, sweep, "accuracy") == pytest.approx([86 / 90, 76 / 80])
    assert ratios(group.records, sweep, "seconds") == pytest.approx([0.5, 0.5])
    without_second = [r for r in sweep if not (r["results"]["arm"] == "full" and r["seed"] == 1)]
    assert ratios(group.records, without_second, "accuracy") == pytest.approx([86 / 90])


def test_a_curve_holds_the_other_settings(sweep):
    curve = retention_curve(sweep, "keep_ratio")
    assert [point[0] for point in curve] == [0.05, 0.1, 0.25]
    kept = [82 / 90, 72 / 80]
    assert curve[0][1:] == pytest.approx((statistics.fmean(kept), statistics.stdev(kept)))
    assert curve[2][1:] == pytest.approx((1, 0))
    assert [point[0] for point in retention_curve(sweep, "slow_ratio")] == [0.05, 0.1]
    assert retention_curve([r for r in sweep if r["results"]["arm"] == "pruned"], "keep_ratio") == []


def test_the_page_tells_means_spreads_and_words(sweep, arm, tmp_path):
    records = [*sweep, arm("full", 70, 9.0, dataset="easy <set>"), arm("dualspeed", 70, 3.0, dataset="easy <set>")]
    paragraphs = ["What was done & why.", "What came out."]
    path = render_experiment(records, tmp_path / "page.html", title="A title", paragraphs=paragraphs)
    page = Page(path.read_text(encoding="utf-8"))
    assert "A title What was done & why. What came out." in page.text
    assert "Results on scenes" in page.text
    assert "Results on easy <set>" in page.text
    assert "DualSpeed 2 81.0 ± 7.1 % 71.0 ± 7.1 % 75 s 0.50 ± 0.00 95.3 ± 0.4 % 200" in page.text
    assert page.source.count("Accuracy kept against keep ratio") == 1
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags


def test_times_that_say_nothing_are_left_out(sweep, tmp_path):
    source = render_experiment(sweep, tmp_path / "a.html", untimed=("dualspeed",)).read_text(encoding="utf-8")
    page = Page(source)
    assert "DualSpeed 2 81.0 ± 7.1 % 71.0 ± 7.1 % – – 95.3 ± 0.4 % 200" in page.text
    assert "40 s" in page.text
    drawing = source[source.index("Accuracy against training time") :]
    assert "DualSpeed" not in drawing[: drawing.index("</figure>")].replace("DualSpeed, no isolator", "")
    everything = {record["results"]["arm"] for record in sweep}
    none = render_experiment(sweep, tmp_path / "b.html", untimed=everything).read_text(encoding="utf-8")
    assert "Accuracy against training time" not in none


def test_a_curve_over_time_is_drawn_with_the_end_of_training(arm, tmp_path):
    slow = arm("full", 90, 100.0)
    slow["results"]["curve"] = [{"seconds": 20, "accuracy": 0.4}, {"seconds": 50, "accuracy": 0.7}]
    source = render_experiment([slow, arm("dualspeed", 88, 50.0)], tmp_path / "a.html").read_text(encoding="utf-8")
    drawing = source[source.index("Accuracy against training time") :]
    line = re.search(r'<path d="(M [^"]+)" clip-path="[^"]+" style="fill: none; stroke: var\(--full\)', drawing)
    assert line is not None
    assert len(re.findall(r"[ML] [\d.]+", line[1])) == 3


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.14159, "3.14 s"), (99, "99 s"), (125, "2 min 05 s"), (3600 * 2 + 180, "2 h 03 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("arm_name", "words"),
    [
        ("full", "Full tokens"),
        ("full_equal_time", "Full tokens, equal time"),
        ("dualspeed_no_kl", "DualSpeed, no kl"),
        ("random_pruner", "Random pruner"),
    ],
)
def test_labels(arm_name, words):
    assert label_of(arm_name) == words


def test_settings_name_who_departs_by_data_set(arm):
    names = ("dualspeed", "dualspeed_keep_5", "dualspeed_keep_20", "dualspeed_annealed", "pruned", "full")
    kept = {"dualspeed_keep_5": 0.05, "dualspeed_keep_20": 0.2}
    records = [arm(name, 80, 9.0, keep_ratio=kept.get(name, 0.1)) for name in names if name != "full"]
    records += [arm("full", 80, 9.0), arm("dualspeed", 80, 9.0, keep_ratio=0.3, dataset="other")]
    for record in records:
        record["settings"]["majority"] = 0.5
    told = dict(settings_table(records))
    assert told["dualspeed.keep_ratio"] == (
        "scenes: 0.1; 0.05 (DualSpeed, keep 5); 0.2 (DualSpeed, keep 20). other: 0.3"
    )
    assert "majority" not in told, "what the data give away is no setting"


def test_arms_are_in_the_order_of_their_numbers(arm):
    names = ["dualspeed_slow_5", "dualspeed_slow_30", "mixed", "dualspeed_keep_20", "dualspeed_keep_5", "full"]
    order = [r["results"]["arm"] for r in arms_of([arm(name, 80, 9.0) for name in names])["scenes"]]
    wanted = ["full", "dualspeed_keep_5", "dualspeed_keep_20", "dualspeed_slow_5", "dualspeed_slow_30", "mixed"]
    assert order == wanted


def test_many_arms_share_one_colour_instead_of_repeating_several(arm, tmp_path):
    names = ["full", "dualspeed", *(f"dualspeed_keep_{share}" for share in range(1, 7))]
    text = render_experiment([arm(name, 80, 9.0) for name in names], tmp_path / "page.html").read_text()
    assert text.count("other arms") == 1
    assert color_of("dualspeed_keep_1", names) == color_of("dualspeed_keep_6", names)
    assert color_of("dualspeed_keep_1", names[:5]) != color_of("dualspeed_keep_2", names[:5])
