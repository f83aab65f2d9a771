"""Pages of several runs, of runs under way and of odd records: readable by all, with the commands that made them."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from tests.report.test_page import Page

from trimtab.errors import OutputError
from trimtab.records import make_record, write_record
from trimtab.report import read_report, render_report, write_report
from trimtab.report.page import RELOAD_SECONDS, page_place


def page_of(records, tmp_path, **options) -> Page:
    return Page(render_report(records, tmp_path / "page.html", **options).read_text(encoding="utf-8"))


def long_run(number: int, steps: int, seed: int = 0, spike: float = 50.0):
    log = [
        {"step": step, "mode": "fast" if step % 10 else "slow", "ce": 2 / (1 + step / 100), "seconds": 0.1}
        for step in range(1, steps + 1)
    ]
    log[steps // 2]["ce"] = spike
    results = {"arm": "dualspeed", "seconds_train": 0.11 * steps, "steps": steps, "samples": steps, "log": log}
    return make_record("train", {"data_files": ["a.json"], "lr": 0.1 * number, "dualspeed": {}}, results, seed=seed)


def test_a_page_of_a_training_under_way_loads_itself_anew_and_a_finished_one_does_not(tmp_path):
    record = long_run(0, 50)
    moving = {**record, "kind": "progress", "results": {**record["results"], "max_steps": 200, "status": "running"}}
    page = page_of([moving], tmp_path)
    assert f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' in page.source
    assert "Training is under way: step 50 of 200." in page.text
    assert "50 of 200" in page.text
    assert 'http-equiv="refresh"' not in page_of([record], tmp_path).source


def test_a_spike_of_a_long_run_is_told_though_the_line_is_a_median(tmp_path):
    page = page_of([long_run(0, 3000)], tmp_path)
    assert "50 step 1,501" in page.text, "the table has the highest value and its step"
    assert "Above the upper edge (triangles): 1, the highest at 50." in page.text
    calm = page_of([long_run(0, 3000, spike=1.0)], tmp_path)
    assert "Above the upper edge" not in calm.text


def test_many_runs_share_a_drawing_up_to_a_number_and_a_table_without_end(tmp_path):
    page = page_of([long_run(number, 40, seed=number, spike=1.0) for number in range(15)], tmp_path)
    assert "The first 12 of 15 are drawn; the table has all." in page.text
    assert all(page.text.count(f"DualSpeed, seed {seed} ") >= 3 for seed in range(15))
    spiked = page_of([long_run(number, 400, seed=number) for number in range(6)], tmp_path)
    assert "Above the upper edge (not drawn): 6, the highest at 50." in spiked.text
    assert "Lines are medians" not in page.text, "forty steps are few enough to be drawn as they are"


def test_long_logs_make_no_long_page(tmp_path):
    short, long = (render_report([long_run(0, many)], tmp_path / f"{many}.html") for many in (4000, 40_000))
    assert long.stat().st_size < 1.15 * short.stat().st_size


def test_every_figure_names_the_command_that_made_it(run, tmp_path):
    for record in run:
        record["command"] = ["trimtab", "quickstart", "--out", "a dir", f"--{record['kind']}"]
    for number, record in enumerate(run):
        write_record(tmp_path / "out" / f"{number}.json", record)
    source = render_report(tmp_path / "out", tmp_path / "page.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="card"><h3>.*?</figure>', source, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        assert "<code>trimtab quickstart --out &#39;a dir&#39; --arm</code>" in figure
        assert "<code>trimtab report out</code>" in figure
    gallery = source[source.index('class="gallery"') : source.index("<h2>Conditions")]
    assert "<code>trimtab quickstart --out &#39;a dir&#39; --pictures</code>" in gallery


def test_many_commands_are_folded(tmp_path):
    records = [{**long_run(n, 20, seed=n), "command": ["trimtab", "train", f"{n}.yaml"]} for n in range(5)]
    assert "3 more commands" in page_of(records, tmp_path).text


def test_records_of_other_kinds_are_listed_and_no_error(tmp_path, run):
    bench = make_record("bench", {"steps": 3}, {"modes": [{"mode": "fast", "seconds": 0.25}], "dualspeed_speedup": 2.5})
    strange = make_record("never heard of", {}, {"deep": {"list": list(range(50)), "truth": True, "none": None}})
    broken = make_record("bench_training", {}, {"rows": 3})
    page = page_of([*run, bench, strange, broken], tmp_path)
    assert "Other records" in page.text
    assert "dualspeed_speedup 2.5" in page.text
    assert "modes.1.seconds 0.25" in page.text
    assert "(50 in all)" in page.text
    alone = page_of([bench], tmp_path)
    assert "No training is among these records." in alone.text


def test_odd_trainings_still_make_a_page(arm, tmp_path):
    bare = make_record("train", {}, {})
    single = make_record("train", {}, {"arm": "full", "log": [{"step": 1, "loss": 2.0, "seconds": 0.5}], "samples": 0})
    holes = arm("dualspeed", 50, 0.0)
    holes["results"]["log"] = [{"step": 1, "mode": "fast", "ce": None, "seconds": None}, {"step": 2, "mode": "slow"}]
    holes["results"]["accuracy_full"] = {"accuracy": 0.5}
    page = page_of([bare, single, holes, arm("full", 60, 0.0)], tmp_path)
    assert page.tags.count("h1") == 1
    assert "of 2 runs. It needs eval_files" in page.text


def test_the_page_is_made_for_screen_readers(run, tmp_path):
    page = page_of([*run, long_run(0, 50)], tmp_path)
    source = page.source
    assert '<html lang="en">' in source
    assert (page.tags.count("main"), page.tags.count("h1"), page.tags.count("footer")) == (1, 1, 1)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.tags.count("caption") == page.tags.count("table")
    labels = re.findall(r'role="region" aria-label="([^"]+)"', source)
    assert len(labels) == len(set(labels)) == page.tags.count("table")
    assert source.count('tabindex="0" role="region"') == len(labels)
    assert not re.findall(r"<th(?! scope|ead)", source)
    for drawing in re.findall(r"<svg[^>]*role=\"img\".*?</svg>", source, flags=re.DOTALL):
        title, finding = re.search(
            r"<title[^>]*>(.+?)</title><desc[^>]*>(.+?)</desc>", drawing, flags=re.DOTALL
        ).groups()
        assert title != finding
        assert re.search(r"\d", finding), f"{title} says what it shows"
    assert source.count("<details><summary>Numbers</summary>") == source.count('<figure class="card"><h3>')


def test_settings_in_which_runs_differ_are_marked(tmp_path):
    page = page_of([long_run(n, 20, seed=n) for n in (0, 0, 3)], tmp_path)
    marked = re.findall(r"<mark>(.*?)</mark>", page.source)
    assert marked == ["0.3"], "0.30000000000000004 is told as a person would"


def test_only_pages_are_replaced(run, tmp_path):
    precious = tmp_path / "model.safetensors"
    precious.write_bytes(b"\x00weights")
    with pytest.raises(OutputError, match="is no HTML page and would be lost"):
        render_report(run, precious)
    assert precious.read_bytes() == b"\x00weights"
    page = render_report(run, tmp_path / "page.html")
    assert render_report(run, page) == page, "a page is"
    (tmp_path / "empty").touch()
    render_report(run, tmp_path / "empty")


def test_the_place_of_the_page(tmp_path):
    assert page_place("out") == page_place("out", None)
    assert str(page_place("out")) == "out/report.html"
    assert page_place("out", tmp_path) == tmp_path / "report.html"
    assert page_place("out", tmp_path / "a.html") == tmp_path / "a.html"


def test_what_the_page_says_is_there_for_programs(run, tmp_path):
    report = read_report(run)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["speed"]["times_faster"] == 2.5
    assert told["accuracy"]["kept"] == pytest.approx(88 / 90)
    assert len(told["accuracy"]["interval"]) == 2
    assert [one["arm"] for one in told["runs"]] == ["full", "pruned", "dualspeed"]
    assert told["command"] is None, "records that came without a directory"
    assert told["headline"] in write_report(report, tmp_path / "a.html").read_text("utf-8").replace("&nbsp;", "\xa0")


def test_memory_by_mode_is_drawn_and_told_first(arm, tmp_path):
    records = []
    for name, steps in (("full", {"full": 300.0}), ("dualspeed", {"fast": 50.0, "slow": 400.0})):
        record = arm(name, 80, 9.0)
        memory = {"held_mib": 100.0, "step_mib": steps, "method": "counted <b>"}
        record["results"] |= {"peak_memory_mib": 100 + max(steps.values()), "memory": memory}
        records.append(record)
    page = page_of(records, tmp_path)
    assert "1.25 of the peak memory of full tokens (500 of 400 MiB)" in page.text
    assert "(500 of 400 MiB), set by its slow steps; a fast step alone 0.38 (150 MiB)" in page.text
    assert "DualSpeed, fast 100.0 50.0 150.0" in page.text
    assert "Measured: counted <b>." in page.text
    assert "The peak memory of fast and slow steps" not in page.text, "it is known"
    odd = arm("full", 80, 9.0)
    odd["results"]["memory"] = {"held_mib": None, "step_mib": {"full": 1.0}}
    assert "Peak memory, by mode" not in page_of([odd], tmp_path).text


def test_times_of_a_trainers_log_are_called_means_between_its_entries(tmp_path):
    entries = [
        {"step": 10 * place, "loss": 1.0, "slow_share": 0.1, "seconds_fast": 0.1, "seconds_slow": 0.4,
         "seconds_data": 0.05}
        for place in (1, 2, 3)
    ]  # fmt: skip
    plain = [{"step": 10 * place, "loss": 1.0, "seconds": 0.25} for place in (1, 2, 3)]
    results = {"seconds_train": 10.0, "steps": 30, "samples": 60}
    records = [
        make_record("train", {}, {"arm": arm, "log": log, **results}, seed=0)
        for arm, log in (("dualspeed", entries), ("full", plain))
    ]
    report = read_report(records)
    tile = next(one for one in report.verdict.tiles if "step" in one["words"])
    assert tile["value"] == "0.40"
    assert "100 ms to 250 ms; a slow one takes 400 ms (medians of means between entries of the log)" in tile["words"]
    page = write_report(report, tmp_path / "a.html").read_text("utf-8")
    assert "A value is the mean over the steps between two entries of the log." in page
    assert "DualSpeed, wait for data" in page
    assert "Where the time of training went" not in page, "means of stretches do not add up to a whole"
    single = read_report([{**records[0], "results": {**records[0]["results"], "log": [
        {**entry, "step": place + 1} for place, entry in enumerate(entries)
    ]}}])  # fmt: skip
    assert "(medians of single steps)" in single.verdict.tiles[0]["words"] + single.verdict.tiles[1]["words"]


def test_pictures_of_several_directories_name_theirs(tmp_path, run):
    picture = next(record for record in run if record["kind"] == "pictures")
    for name in ("one", "two"):
        write_record(tmp_path / name / "records" / "pictures.json", picture)
    report = read_report([tmp_path / "one", tmp_path / "two"])
    page = write_report(report, tmp_path / "a.html").read_text("utf-8")
    assert "<p>one.</p>" in page
    assert "<p>two.</p>" in page
