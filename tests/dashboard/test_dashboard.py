"""The page at /, in a real browser, beside what /metrics says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Watched, browser_page
from prometheus_client.parser import text_string_to_metric_families
from serving import RunningServer

from foveate.api.metrics_reference import everything

Eventually = Callable[[Callable[[], bool]], None]
TTFT = "foveate_time_to_first_token_seconds"
ENCODED = 'foveate_stage_seconds_count{stage="encode"}'


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with browser_page(viewport={"width": 1280, "height": 800}) as opened:
        yield opened


@pytest.fixture
def shown(busy: RunningServer, watched: Watched) -> Watched:
    """The dashboard of the busy server, with its first numbers."""
    watched.requests.clear()
    watched.complaints.clear()
    watched.page.goto(busy.url)
    watched.page.wait_for_selector("#times tbody tr")
    watched.page.wait_for_selector("#errors tbody tr")
    return watched


def value(watched: Watched, place: str, key: str) -> float:
    """The number behind a value that is shown, before it was rounded for people."""
    text = watched.page.get_attribute(f"{place} [data-key='{key}']", "data-value")
    assert text, f"{key} shows no number"
    return float(text)


def cell(watched: Watched, row: str, column: int) -> str:
    return str(watched.page.inner_text(f"#times [data-row='{row}'] td:nth-of-type({column})"))


def test_what_is_shown_is_what_metrics_says(shown: Watched, busy: RunningServer) -> None:
    assert value(shown, "#tiles", "answered") == busy.metric("foveate_request_seconds_count") >= 3
    assert value(shown, "#tiles", "running") == busy.metric("foveate_requests_running") == 0
    counts = httpx.get(f"{busy.url}/status").json()["error_counts"]
    assert value(shown, "#tiles", "errors") == sum(counts.values()) >= 2
    assert value(shown, "#arena", "arena_bytes") == busy.metric('foveate_vision_arena_bytes{service="own"}')
    assert value(shown, "#memory", "memory:engine") > 10 * 2**20
    assert cell(shown, "time to first token", 5) == f"{busy.metric(f'{TTFT}_count'):.0f}"
    # The third picture was known.
    assert cell(shown, "encode", 5) == f"{busy.metric(ENCODED):.0f}" == "2"
    assert "ready" in shown.page.inner_text("header")
    assert "model on cpu, float32" in shown.page.inner_text("#facts")


def test_percentiles_are_those_of_the_histogram(shown: Watched, busy: RunningServer) -> None:
    text = httpx.get(f"{busy.url}/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    counts = [(float(one.labels["le"]), one.value) for one in found[TTFT].samples if one.name.endswith("_bucket")]
    for q in (0.5, 0.95, 0.99):
        computed = shown.page.evaluate(
            "async ([text, name, q]) => { const m = await import('/static/metrics.js');"
            " return m.quantile(q, m.histogram(m.parse(text), null, name)); }",
            [text, TTFT, q],
        )
        # The bucket in which the quantile's observation lies.
        wanted = math.ceil(q * counts[-1][1])
        upper = next(le for le, cumulative in counts if cumulative >= wanted)
        lower = max([0.0, *(le for le, _ in counts if le < upper)])
        assert lower <= computed <= upper
    assert re.fullmatch(r"[\d.]+ (µs|ms|s)", cell(shown, "time to first token", 6))


def test_quantiles_are_interpolated_and_counters_may_begin_again(shown: Watched) -> None:
    before = 'c_total{a="x"} 10\nc_total{a="y"} 3\nn 1'
    after = '# HELP c_total {a="x"} 7\nc_total{a="x"} 4\nc_total{a="y"} 5\nd{a="q\\"}\\n"} +Inf'
    result = shown.page.evaluate(
        """async ([earlier, later]) => {
          const m = await import('/static/metrics.js');
          const [before, after] = [m.parse(earlier), m.parse(later)];
          const halfway = [[1, 0], [2, 4], [Infinity, 4]];
          const beyond = [[1, 1], [Infinity, 10]];
          return [
            m.quantile(0.5, halfway), m.quantile(0.99, beyond), m.quantile(0.5, []),
            m.increase(after, before, 'c_total'), m.increase(after, before, 'none_total'),
            m.series(after, 'd')[0].labels.a,
          ];
        }""",
        [before, after],
    )
    assert result == [1.5, 1, None, 6, None, 'q"}\n']


def test_rates_come_from_what_happens_while_one_looks(
    shown: Watched, busy: RunningServer, eventually: Eventually
) -> None:
    before = value(shown, "#tiles", "answered")
    body = {"model": busy.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
    assert httpx.post(f"{busy.url}/v1/chat/completions", json=body | {"ignore_eos": True}).status_code == 200
    shown.page.wait_for_selector("#tokens [data-key='output_rate']:not([data-value='']):not([data-value='0'])")
    assert value(shown, "#tokens", "output_rate") > 0
    shown.page.wait_for_selector("#ttft [data-key='ttft_p95']:not([data-value=''])")
    assert 0 < value(shown, "#ttft", "ttft_p50") <= value(shown, "#ttft", "ttft_p99")
    assert value(shown, "#tiles", "answered") == before + 1


def test_an_errors_text_is_text(shown: Watched) -> None:
    rows = shown.page.locator("#errors tbody tr").all_inner_texts()
    assert any("<b>bold</b><img src=x onerror=alert(1)>" in row and "model_not_found" in row for row in rows)
    assert shown.page.locator("#errors tbody :is(b, img)").count() == 0
    (about_url,) = [row for row in rows if "image_unreachable" in row]
    assert "(URL)" in about_url
    assert "secret" not in shown.page.inner_text("body")
    assert "model_not_found 1" in shown.page.inner_text("#error-counts")


def test_nothing_is_asked_of_anybody_else(shown: Watched, busy: RunningServer) -> None:
    shown.page.goto(f"{busy.url}/docs")
    shown.page.wait_for_selector("#schemas article")
    names = {urlsplit(address).netloc for address in shown.requests}
    assert names == {urlsplit(busy.url).netloc}
    assert {urlsplit(address).path for address in shown.requests} >= {"/", "/metrics", "/status", "/static/style.css"}
    assert shown.complaints == []


def test_the_reference_has_every_endpoint_and_field(shown: Watched, busy: RunningServer) -> None:
    shown.page.goto(f"{busy.url}/docs")
    shown.page.wait_for_selector("#schemas article")
    description = httpx.get(f"{busy.url}/openapi.json").json()
    endpoints = shown.page.locator("#operations h3").all_inner_texts()
    assert sorted(endpoints) == sorted(
        f"{method.upper()}{path}" for path, methods in description["paths"].items() for method in methods
    )
    for name in ("ChatCompletionRequest", "ImageContent", "Usage", "ErrorDetail"):
        fields = shown.page.locator(f"#{name} td:first-child").all_inner_texts()
        assert fields == list(description["components"]["schemas"][name]["properties"])
    assert shown.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(shown: Watched, scheme: str) -> None:
    page = shown.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ground, ink = page.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (brightness[0] < brightness[1]) == (scheme == "dark")
    page.set_viewport_size({"width": 1280, "height": 800})


def test_gpus_are_shown_where_there_are_any(shown: Watched) -> None:
    # Hardly a machine that runs this has one: the numbers are those that the metrics' page is made with.
    page = shown.page
    page.route("**/metrics", lambda route: route.fulfill(body=everything().render().decode()))
    page.reload()
    page.wait_for_selector("#use [data-key='gpu_use:GPU 0']")
    assert page.inner_text("#use h2") == "GPU use"
    assert page.inner_text("#use .legend b") == "50 %"
    assert page.inner_text("#memory h2") == "GPU memory"
    assert page.locator("#memory .legend li").count() == 1
    page.unroute_all()
    assert shown.complaints == []
