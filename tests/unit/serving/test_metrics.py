"""The list of metrics, the recorder, and the text that Prometheus reads, checked with Prometheus's own parser."""

from __future__ import annotations

import math
import threading
from collections import Counter
from types import ModuleType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayward.contract.contract import Normaliser
from rayward.serving import dispatch, shadow
from rayward.serving.calls import QUEUED_TOKENS, Histogram, Stats
from rayward.serving.engine import counts
from rayward.serving.metrics import BY_NAME, METRICS, PREFIX, Recorder, quantile, render
from rayward.wire.dialect import Timings
from rayward.wire.items import ItemError, ItemResult, ScoreItem


def _recorder(source: str = "replica#1", role: str = "replica") -> Recorder:
    return Recorder(source, role, model="helper", version="3f2a9c01b7de", clock=lambda: 1_700_000_000.0)


def test_names_follow_prometheus_and_do_not_collide() -> None:
    written = Counter(
        f"{metric.name}{suffix}"
        for metric in METRICS
        for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
    )
    assert [name for name, times in written.items() if times > 1] == []
    assert [metric.name for metric in METRICS if (metric.kind == "counter") != metric.name.endswith("_total")] == []
    assert [metric.name for metric in METRICS if (metric.kind == "histogram") != bool(metric.bounds)] == []
    assert all(list(metric.bounds) == sorted(set(metric.bounds)) for metric in METRICS)
    assert [metric.name for metric in METRICS if not metric.help.endswith(".")] == []


def test_the_text_is_read_back_by_prometheus() -> None:
    recorder = _recorder()
    recorder.add("refusals_total", 3, reason='too "long"\\\n')
    recorder.set(QUEUED_TOKENS, 4096)
    for seconds in (0.0, 0.001, 0.3, 120.0):
        recorder.observe("stage_seconds", seconds, stage="queue")
    text = render([recorder.stats(), _recorder("replica#2").stats()])
    families = {family.name: family for family in text_string_to_metric_families(text)}

    (refused,) = families[f"{PREFIX}refusals"].samples
    assert refused.value == 3
    assert refused.labels == {
        "role": "replica",
        "source": "replica#1",
        "model": "helper",
        "version": "3f2a9c01b7de",
        "reason": 'too "long"\\\n',
    }
    assert families[f"{PREFIX}queued_tokens"].samples[0].value == 4096
    buckets = {sample.labels["le"]: sample.value for sample in families[f"{PREFIX}stage_seconds"].samples if "le" in sample.labels}
    # A bound belongs to the bucket that it closes.
    assert (buckets["0.001"], buckets["0.25"], buckets["0.5"], buckets["100"], buckets["+Inf"]) == (2, 2, 3, 3, 4)
    (total,) = [sample.value for sample in families[f"{PREFIX}stage_seconds"].samples if sample.name.endswith("_sum")]
    assert total == pytest.approx(120.301)
    assert {sample.labels["source"] for sample in families[f"{PREFIX}start_time_seconds"].samples} == {"replica#1", "replica#2"}
    for family in families.values():
        assert family.documentation == BY_NAME[family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")].help


def test_every_metric_can_be_written() -> None:
    recorder = _recorder()
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        {"counter": recorder.add, "gauge": recorder.set, "histogram": recorder.observe}[metric.kind](metric.name, 1.5, **labels)
    families = list(text_string_to_metric_families(render([recorder.stats()])))
    assert len(families) == len(METRICS)


def test_a_label_of_the_series_replaces_that_of_the_process() -> None:
    recorder = _recorder()
    recorder.add("dispatched_requests_total", model="other", version="b", outcome="answered")
    (family,) = [
        family for family in text_string_to_metric_families(render([recorder.stats()])) if family.name == f"{PREFIX}dispatched_requests"
    ]
    assert family.samples[0].labels == {"role": "replica", "source": "replica#1", "model": "other", "version": "b", "outcome": "answered"}


def test_values_that_are_no_numbers_and_names_that_are_not_listed_are_written_too() -> None:
    stats = Stats("r", "replica", 0.0, counters={("novel_total", ()): 1.0}, gauges={("up", ()): math.nan, ("down", ()): -math.inf})
    values = {sample.name: sample.value for family in text_string_to_metric_families(render([stats])) for sample in family.samples}
    assert values[f"{PREFIX}novel_total"] == 1.0
    assert math.isnan(values[f"{PREFIX}up"])
    assert values[f"{PREFIX}down"] == -math.inf


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda r: r.add("no_such_metric"), KeyError),
        (lambda r: r.add("queued_tokens"), ValueError),
        (lambda r: r.add("refusals_total"), ValueError),
        (lambda r: r.add("refusals_total", why="x"), ValueError),
        (lambda r: r.add("forwards_total", -1), ValueError),
        (lambda r: r.add("forwards_total", math.nan), ValueError),
    ],
)
def test_what_the_list_does_not_know_cannot_be_recorded(call: object, error: type[Exception]) -> None:
    recorder = _recorder()
    with pytest.raises(error):
        call(recorder)  # type: ignore[operator]
    assert recorder.stats().counters == {}


def test_stats_do_not_change_after_they_were_taken() -> None:
    recorder = _recorder()
    recorder.add("forwards_total")
    recorder.observe("batch_fill_ratio", 0.5)
    taken = recorder.stats()
    recorder.add("forwards_total")
    recorder.observe("batch_fill_ratio", 0.5)
    assert taken.counters[("forwards_total", ())] == 1
    assert sum(taken.histograms[("batch_fill_ratio", ())].counts) == 1


def test_threads_lose_no_count() -> None:
    recorder = _recorder()

    def count() -> None:
        for _ in range(2000):
            recorder.add("forwards_total")
            recorder.move("queued_items", 1)
            recorder.observe("batch_fill_ratio", 0.25)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = recorder.stats()
    assert stats.counters[("forwards_total", ())] == stats.gauges[("queued_items", ())] == 8000
    assert sum(stats.histograms[("batch_fill_ratio", ())].counts) == 8000


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((0, 0, 0), 0.5, None),
        ((10, 0, 0), 0.5, 0.5),  # half of the way from 0 to 1
        ((0, 10, 0), 0.25, 1.25),
        ((5, 5, 0), 0.5, 1.0),
        ((0, 0, 10), 0.99, 2.0),  # beyond the last bound, the bound
        ((9, 0, 1), 0.99, 2.0),
    ],
)
def test_quantiles_are_linear_within_a_bucket(counts: tuple[int, ...], share: float, expected: float | None) -> None:
    assert quantile(Histogram((1.0, 2.0), counts, 0.0), share) == expected


def test_a_quantile_below_the_first_negative_bound_is_that_bound() -> None:
    assert quantile(Histogram((-2.0, 0.0), (10, 0, 0), 0.0), 0.5) == -2.0


@pytest.mark.parametrize("module", [dispatch, shadow])
def test_what_dispatchers_count_is_in_the_list(module: ModuleType) -> None:
    constants = {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str) and not name.startswith("_")}
    assert len(constants) > 5
    assert constants - set(BY_NAME) == set()


def test_a_replica_counts_under_names_of_the_list() -> None:
    normaliser = Normaliser(mean=1.0, std=2.0, num_rewards=10, reference="held-out prompts")
    counted = counts.Counts("r1", model="helper", version="v", normaliser=normaliser)
    counted.forward(num_units=3, num_tokens=100, budget=200, seconds=0.1)
    item = ScoreItem(prompt=({"role": "user", "content": "a"},), completions=("b", "c"))
    good = ItemResult(rewards=(1.0, 5.0), num_tokens=(5, 6), tokens=11, tokens_computed=8)
    counted.answered([item, item], [good, ItemResult(error=ItemError.of("non_finite", "NaN"))], Timings(queue_s=0.1))
    families = {family.name for family in text_string_to_metric_families(render([counted.stats()]))}
    assert {f"{PREFIX}reward_standardised", f"{PREFIX}reward_sums", f"{PREFIX}reference_std", f"{PREFIX}non_finite"} <= families
