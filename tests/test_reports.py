"""Analysis of route logs, figures, and the HTML report: the shown values are the measured values."""

import dataclasses
import html.parser
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rooms import TwoRooms, room_images

import advmoe
from advmoe.config import AttackConfig, ModelConfig
from advmoe.data.sets import ImageSet
from advmoe.errors import ConfigError, DataError
from advmoe.evaluation.analysis import analyze, flow, histogram
from advmoe.evaluation.card import (
    CardNumbers,
    beyond_autoattack,
    figures,
    latencies,
    load_card,
    make_card,
    pixels,
    save_card,
    standard_error,
    with_error,
)
from advmoe.evaluation.cost import Cost
from advmoe.evaluation.diagnostics import Diagnostic
from advmoe.evaluation.dissection import route_log
from advmoe.evaluation.results import SuiteConfig, SuiteResult
from advmoe.evaluation.suite import run_suite
from advmoe.evaluation.vocabulary import RA, RA_PGD, RA_WORST, READINGS, SA, Attack
from advmoe.models.masked import mask_pathway
from advmoe.reports.figures import (
    accuracies,
    analysis_figures,
    changed_layers,
    dissections,
    expert_load,
    pathways_flow,
    radius_curve,
    scale_curves,
)
from advmoe.reports.html import render
from advmoe.reports.training import read_log
from advmoe.routing_log import RouteLog
from advmoe.schema import fields_of

OPTIONAL = {field.name for field in fields_of(CardNumbers) if field.default is not dataclasses.MISSING}
"""Figures that are absent from a card where they were not measured."""
HOSTILE = "<script>alert('x')</script> & \"co\""


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    images = (255 * room_images(124 / 255, 110 / 255, 140 / 255)).round().byte().permute(0, 2, 3, 1).contiguous()
    return run_suite(
        TwoRooms(),
        ImageSet(images=images.numpy(), labels=np.zeros(3, np.int64), class_names=("zero", "one")),
        SuiteConfig(
            attack=AttackConfig(eps=8 / 255, steps=4, step_size=2 / 255), diagnosed=0, eps_sweep=(2 / 255, 16 / 255)
        ),
    )


def card_of(result: SuiteResult, name: str) -> dict[str, Any]:
    return make_card(
        result,
        name=name,
        dataset="rooms",
        model=ModelConfig(arch="vgg16"),
        train={"method": "advmoe", "epochs": 3},
        cost=Cost(parameters=1234, gflops=0.000123456789),
        device="one core",
        latency={1: 2.345678, 64: 0.25},
    )


def test_the_card_speaks_robustbench_and_says_whether_to_trust_it(result: SuiteResult, tmp_path: Path) -> None:
    card = card_of(result, "rooms")
    # Two of three images are right; the one near the threshold falls to the routing attacks only.
    assert {name: card[name] for name in ("clean_acc", "reported", "autoattack_acc", "eps", "unreliable")} == {
        "clean_acc": "66.67",
        "reported": "33.33",
        "autoattack_acc": None,
        "eps": "8/255",
        "unreliable": None,  # no diagnostics were run
    }
    assert card["advmoe"]["gflops"] == 0.000123457  # six digits, also of a tiny network
    assert card["advmoe"]["ra_by_eps"] == {"2/255": 66.67, "16/255": 66.67}
    assert card["advmoe"]["trusted"] is None
    assert card["advmoe"]["verdict"] == "not checked"
    assert card["advmoe"]["latency_ms_per_image"] == {"1": 2.346, "64": 0.25}
    assert card["advmoe"]["latency_device"] == "one core"
    (machine,) = result.machines  # which attacked
    assert (card["advmoe"]["device"], card["advmoe"]["versions"]) == (machine["device"], machine["versions"])
    assert latencies(card["advmoe"]).endswith("(batch 64) on one core")
    earlier = {name: value for name, value in card["advmoe"].items() if name != "latency_device"}
    assert latencies(earlier).endswith(f"(batch 64) on {machine['device']}")
    path = tmp_path / "card.json"
    save_card(path, card)
    assert load_card(path) == json.loads(json.dumps(card))
    nested = 100_000 * "["
    for text, reason in (
        ("{}", "it has no 'advmoe'"),
        ("[]", ""),
        ('{"advmoe": 3}', ""),
        ("not JSON", ""),
        (nested, ""),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=f"is not a result card: .*{reason}"):
            load_card(path)


@pytest.mark.parametrize(
    ("columns", "footnote"),
    [  # images 0 and 1 withstand AutoAttack; image 1 is broken where 'worst' is false
        ({"pgd": [1, 0], "further": [1, 0], "worst": [1, 0]}, "PGD"),
        ({"pgd": [1, 1], "further": [1, 0], "worst": [1, 0]}, "further starts of PGD"),
        (
            {"pgd": [1, 1], "view/softmax": [0, 1], "route": [1, 0], "worst": [0, 0]},
            "PGD through the views of the routing, the route attack",
        ),
        ({"pgd": [1, 1], "route": [1, 1], "routers": [1, 0], "experts": [0, 0], "worst": [1, 0]}, "RA-R"),
        ({"pgd": [1, 1], "route": [1, 1], "routers": [1, 1], "experts": [1, 0], "worst": [1, 0]}, "RA-E"),
        ({"pgd": [1, 1], "experts": [1, 0], "eps/0.5": [0, 0], "worst": [1, 1]}, ""),
    ],
)
def test_the_footnote_names_the_attacks_that_broke_what_autoattack_left(
    result: SuiteResult, columns: dict[str, list[int]], footnote: str
) -> None:
    every = {**columns, "autoattack/square": [1, 1]}
    attacks = tuple(Attack(*name.split("/")) for name in every)  # type: ignore[arg-type]
    arrays = {f"robust/{name}": np.array(column, bool) for name, column in every.items()}
    assert ", ".join(beyond_autoattack(dataclasses.replace(result, attacks=attacks, arrays=arrays))) == footnote


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": None}, "method must be a text"),
        ({"verdict": "fine"}, "unknown verdict 'fine'"),
        ({"gflops": "cheap"}, "gflops must be a number"),
        ({"sa": 101.0}, "sa must be"),
        ({"ra_pgd4": "high"}, "RA under PGD must be a number"),
        ({"diagnostics": [{"name": "finite"}]}, "needs a value for status"),
        ({"model": {"arch": "vgg16", "depth": "deep"}}, "depth must be"),
        ({"images": 0}, "images must be"),
        ({"nonsense": 1}, "has no field nonsense"),
    ],
)
def test_a_card_that_does_not_fit_its_description_is_refused_with_the_reason(
    result: SuiteResult, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    card = card_of(result, "rooms")
    for name in (*card["advmoe"], None):
        path, numbers = tmp_path / "card.json", dict(card["advmoe"])
        if name is None:
            numbers |= change
        elif name in OPTIONAL:
            continue
        else:
            del numbers[name]
        save_card(path, card | {"advmoe": numbers})
        with pytest.raises(DataError, match=r"is not a result card: " + (".*" if name else f".*{reason}")):
            load_card(path)


def test_a_failed_diagnostic_marks_card_and_report(result: SuiteResult) -> None:
    failed = Diagnostic("finite", "failed", "not finite: router logits", "finite logits")
    broken = SuiteResult(**{**vars(result), "diagnostics": (failed,)})
    card = card_of(broken, "broken")
    assert card["unreliable"] is True
    assert card["advmoe"]["trusted"] is False
    page = render([card], {})
    assert "not to be trusted" in page
    assert "not finite: router logits" in page


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (0.5 / 255, "0.5/255"),
        (0.0, "0/255"),
        (1.0, "255/255"),
        (0.001, "0.255/255"),
        (0.0156863, "4/255"),  # 4/255 as the name of a result holds it
        (1e-6, "0.000255/255"),
    ],
)
def test_radii_are_written_as_the_field_does(eps: float, text: str) -> None:
    assert pixels(eps) == text


def test_the_analysis_counts_what_the_log_holds(result: SuiteResult) -> None:
    found = analyze(route_log(result, TwoRooms()), TwoRooms())
    # Clean: two images below the threshold take expert 0, the third (in the trap) expert 1. Worst:
    # one more is flipped.
    assert found["conditions"]["clean"]["load"] == [[0.6667, 0.3333]]
    assert found["conditions"]["worst"]["load"] == [[0.3333, 0.6667]]
    assert found["conditions"]["clean"]["load_by_class"] == [[[0.6667, 0.3333], [0.0, 0.0]]]
    assert found["conditions"]["clean"]["frequent"][0] == {"pathway": "0", "images": 2}
    # Entropy of (2/3, 1/3) in units of log 2: 0.9183.
    assert found["conditions"]["clean"]["entropy"] == [0.9183]
    # Two experts of two channels each, disjoint: the flipped image's pathways share nothing, the
    # others' everything.
    assert found["similarity"]["overlap"]["worst"]["mean"] == 0.6667
    # Pairs of clean images: (0,1) equal, (0,2) and (1,2) disjoint.
    assert found["similarity"]["diversity"]["clean"] == {
        "counts": [2, *[0] * 38, 1],
        "mean": 0.3333,
        "pairs": 3,
    }


def test_pathways_are_compared_with_the_mask_of_a_sparse_cnn() -> None:
    moe = advmoe.create_model("vgg16", width=0.0625)
    sparse = advmoe.create_model("vgg16", kind="sparse_cnn", width=0.0625)
    log = RouteLog([2] * 12)
    log.append("clean", [0, 1], [[0] * 12, [1] * 12], labels=[0, 1], predictions=[0, 1])
    found = analyze(log, moe, sparse=sparse)
    # Expert 0 owns the first half of each layer's channels; half of all channels are kept, so with
    # k of them shared out of h + h, IoU = k / (2h - k).
    shared, kept = 0, 0
    for layout, channels in zip(moe.expert_layouts, mask_pathway(sparse), strict=True):
        shared += len(set(layout.channels(0)) & set(channels))
        kept += len(channels)
    first, second = shared / (2 * kept - shared), (kept - shared) / (kept + shared)
    assert found["mask"]["clean"]["mean"] == pytest.approx((first + second) / 2, abs=1e-4)
    # The least and the largest IoU of the 2^12 pathways, layer by layer from 0 to k channels in common.
    lists = [
        [len(set(layout.channels(e)) & set(channels)) for e in range(2)]
        for layout, channels in zip(moe.expert_layouts, mask_pathway(sparse), strict=True)
    ]
    sums = [sum(choice) for choice in itertools.product(*lists)]
    extremes = [common / (2 * kept - common) for common in (min(sums), max(sums))]
    assert found["mask_reachable"] == pytest.approx(extremes, abs=1e-4)
    assert extremes[0] < extremes[1]
    one = analyze(log, advmoe.create_model("vgg16", width=0.0625, granularity="image"), sparse=sparse)
    assert one["mask_reachable"] == pytest.approx(sorted((first, second)), abs=1e-4)  # all layers choose together
    with pytest.raises(ConfigError, match="on one backbone"):
        analyze(log, moe, sparse=advmoe.create_model("resnet18", kind="sparse_cnn", width=0.0625))
    own = advmoe.create_model("vgg16", width=0.0625, model_scale=0.75, expert_filters="separate")
    with pytest.raises(ConfigError, match="experts that are its windows"):
        analyze(log, own, sparse=sparse)
    # No filter of expert 0 is one of expert 1: clean pathways share nothing.
    assert analyze(log, own)["similarity"]["diversity"]["clean"]["mean"] == 0.0
    with pytest.raises(
        ConfigError, match="only the routing of an MoE-CNN can be analyzed, and a dense network has none"
    ):
        analyze(RouteLog([]), advmoe.create_model("vgg16", kind="dense", width=0.0625))


def test_the_changes_of_routed_tokens_are_counted_layer_by_layer() -> None:
    model = advmoe.create_model("vit", num_classes=2, width=1 / 6, depth=2, granularity="token")
    layers, tokens = len(model.expert_layouts), model.rows_per_image
    assert (layers, tokens) == (2, 65)
    log, clean = RouteLog([2] * (layers * tokens)), np.zeros((2, layers, tokens), np.int64)
    attacked = clean.copy()
    attacked[0, 1, :13] = 1  # 13 of the 2 * 65 decisions in the second layer
    for name, taken in (("clean", clean), ("pgd", attacked)):
        log.append(name, [0, 1], taken.reshape(2, -1), labels=[0, 1], predictions=[0, 1])
    found = analyze(log, model)
    assert found["conditions"]["pgd"]["dissection"]["changed_by_layer"] == [0.0, 10.0]
    assert found["conditions"]["pgd"]["dissection"]["router_robustness"] == 50.0
    drawn = analysis_figures(found)
    assert "Tokens whose expert changes under attack" in drawn["changed_layers"]
    assert "per cent of the tokens of 2 images" in drawn["changed_layers"]
    assert "per cent of tokens" in drawn["load"]


def test_pathways_of_more_than_ten_experts_are_written_apart() -> None:
    model = advmoe.create_model("vgg16", width=0.0625, num_experts=12, model_scale=0.25, routed="last-2-blocks")
    log = RouteLog([12, 12])
    log.append("clean", [0, 1], [[1, 10], [11, 0]], labels=[0, 1], predictions=[0, 1])
    frequent = analyze(log, model)["conditions"]["clean"]["frequent"]
    assert {each["pathway"] for each in frequent} == {"1-10", "11-0"}  # both would be 110


def test_one_image_has_no_pairs(result: SuiteResult) -> None:
    log = RouteLog([2])
    for name in ("clean", "pgd"):
        log.append(name, [0], [[0]], labels=[0], predictions=[0])
    found = analyze(log, TwoRooms())
    assert list(found["similarity"]) == ["overlap"]
    assert "overlap" in analysis_figures(found)
    assert "Pathways of pairs" not in render([card_of(result, "one")], {"one": found})


def test_histograms_count_every_value() -> None:
    values = histogram(np.array([0.0, 0.5, 1.0]))
    assert sum(values["counts"]) == 3
    assert (values["counts"][0], values["counts"][20], values["counts"][39]) == (1, 1, 1)
    assert values["mean"] == 0.5


def test_figures_are_svg_with_text_and_their_numbers(result: SuiteResult) -> None:
    found = analyze(route_log(result, TwoRooms()), TwoRooms())
    drawn = analysis_figures(found)
    assert list(drawn) == ["dissection", "load", "changed_layers", "overlap", "diversity"]  # one layer: no flow
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "33.3" in drawn["dissection"]
    assert drawn == analysis_figures(found)


class Page(html.parser.HTMLParser):
    """Collects tags, and whatever a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            f"{name}={value}"
            for name, value in attributes
            if name in {"src", "href", "xlink:href"} and value and not value.startswith(("#", "data:image/png"))
        ]


def test_the_report_is_self_contained_and_escapes_names(result: SuiteResult) -> None:
    cards = [card_of(result, HOSTILE), card_of(result, "second")]
    page = render(cards, {HOSTILE: analyze(route_log(result, TwoRooms()), TwoRooms())})
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.fetched == []
    assert not re.search(r"url\((?!#|&quot;#|'#)", page)
    assert "alert(" in page  # shown as text
    assert '<meta name="viewport"' in page
    assert "@media print" in page
    for number in ("66.67", "33.33", "1,234", "4 steps of 2/255", "2.35 ms an image (batch 1), 0.25 ms"):
        assert number in page
    numbers = figures(result)
    assert numbers["standard_error"] == 27.22  # sqrt(1/3 * 2/3 / 3)


def texts_of(svg: str) -> set[str]:
    return {str(text.text).strip() for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("name", ["costs $5_a_$6", "_hidden", "50% \\alpha^2"])
def test_figures_show_names_as_they_are(result: SuiteResult, name: str) -> None:
    cards = [card_of(result, name), card_of(result, "second")]
    swept = {**cards[0]["advmoe"], "ra_by_eps": {"2/255": 80.0}}
    cards[0]["advmoe"] = swept
    for drawn in (accuracies(cards, [SA]), radius_curve(cards)):
        assert drawn is not None
        assert {name, "second"} <= texts_of(drawn)


def test_shares_carry_their_standard_error(result: SuiteResult) -> None:
    assert standard_error(50.0, 100) == 5.0  # sqrt(1/2 * 1/2 / 100)
    assert standard_error(0.0, 10) == standard_error(100.0, 10) == 0.0
    assert with_error(50.0, 100) == "50.00 ± 5.00"
    # 0.97^100 = 0.048: with a true share of 3 %, no image of 100 is hit in 5 % of all cases.
    assert (with_error(0.0, 100), with_error(100.0, 100, digits=1)) == ("0.00 (< 3.00)", "100.00 (> 97.0)")
    assert with_error(0.0, 1) == "0.00 (< 100.00)"
    none = card_of(result, "none")
    none["advmoe"] |= {"sa": 100.0, "ra_worst": 0.0}
    assert "100.00\N{NO-BREAK SPACE}(&gt;\N{NO-BREAK SPACE}0.0)" in render([none], {})
    page = render([card_of(result, "one")], {})
    assert "66.67\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}27.2" in page
    assert "33.33\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}27.2" in page
    assert "3 rooms test images, seed 0" in page


def test_a_report_shows_the_ra_of_a_table_where_it_is_more_than_that_under_pgd(result: SuiteResult) -> None:
    card = card_of(result, "one")
    share = "33.33\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}27.2"
    assert f"<tr><td>{RA.long}</td><td>{share}</td></tr>" in render([card], {})
    del card["advmoe"]["ra_route"]
    assert RA.long not in render([card], {})


def test_a_report_leaves_out_figures_that_rest_on_unequal_attacks_and_says_why(result: SuiteResult) -> None:
    cards = [card_of(result, "first"), card_of(result, "second")]
    shown = render(cards, {}, left_out=dict.fromkeys((RA.key, RA_WORST.key), "it was spared"))
    assert "<p>Left out: RA; RA, worst. Reason: it was spared.</p>" in shown
    assert f"<td>{RA_PGD.label(cards[0]['advmoe'])}</td>" in shown
    for figure in (RA, RA_WORST):
        assert f"<td>{figure.long}</td>" in render(cards, {})
        assert f"<td>{figure.long}</td>" not in shown
        assert f">{figure.short}</text>" in render(cards, {})
        assert f">{figure.short}</text>" not in shown


def test_long_names_leave_space_for_the_figures(result: SuiteResult) -> None:
    names = [f"/home/someone/experiments/of-this-year/robustness/{number}/evaluation" for number in "ab"]
    analysis = analyze(route_log(result, TwoRooms()), TwoRooms())
    # with less space, matplotlib warns, which fails a test
    for drawn in (
        accuracies([card_of(result, name) for name in names], [SA]),
        accuracies([card_of(result, names[0] + str(number)) for number in range(8)], [SA]),
        dissections(dict.fromkeys(names, analysis)),
    ):
        assert "experiments" in drawn


def sweep(result: SuiteResult) -> list[dict[str, Any]]:
    """Cards of ten models: two numbers of experts at four scales each, S-Dense at one, and Dense."""
    cards = []
    settings = [("moe", experts, scale) for experts in (2, 4) for scale in (0.8, 0.2, 0.4, 0.6)]
    for kind, experts, scale in [*settings, ("s_dense", 2, 0.5), ("dense", 2, 0.5)]:
        card = card_of(result, f"{kind}-n{experts}-r{scale}")
        card["advmoe"]["model"] |= {"kind": kind, "num_experts": experts, "model_scale": scale}
        card["advmoe"] |= {"trusted": True, "verdict": "trusted"}
        card["advmoe"]["diagnostics"] = [{"name": "finite", "status": "passed", "value": "", "expected": ""}]
        cards.append(card)
    return cards


def test_a_sweep_over_r_is_drawn_as_a_line_for_each_number_of_experts(result: SuiteResult) -> None:
    assert scale_curves([card_of(result, "one"), card_of(result, "two")]) is None
    drawn = scale_curves(sweep(result))
    assert drawn is not None
    for label in ("moe, advmoe, N = 2", "moe, advmoe, N = 4", "s_dense, advmoe", "dense, advmoe", "model scale r"):
        assert f"{label}<" in drawn
    other = card_of(result, "another seed")
    other["advmoe"]["model"] |= {"kind": "dense"}
    other["advmoe"]["ra_pgd4"] = 0.0  # the first one has 66.67
    both = scale_curves([*sweep(result), other])
    assert both is not None
    assert "dense, advmoe, mean of 2<" in both
    dashed = r'<path d="([^"]*)"[^>]*stroke-dasharray'
    assert re.findall(dashed, both)
    assert re.findall(dashed, both) != re.findall(dashed, drawn)


def test_many_models_stand_in_rows_and_only_their_failures_at_length(result: SuiteResult) -> None:
    cards = sweep(result)
    cards[3]["advmoe"] |= {"trusted": False, "verdict": "not to be trusted"}
    cards[3]["advmoe"]["diagnostics"][0] |= {"status": "failed", "value": "NaN"}
    page = render(cards, {})
    assert page.count("<tr><td>moe-n4-r0.8</td>") == 2  # accuracies, settings
    assert "Nothing failed in 9 models" in page
    assert page.count("<h3>") == 1
    assert "<h3>moe-n2-r0.6</h3>" in page
    few = render(cards[:2], {})
    assert few.count("<h3>") == 2
    assert "<th>moe-n2-r0.8</th>" in few


def test_pathways_flow_from_layer_to_layer(result: SuiteResult) -> None:
    # Three images take experts 0-0, 0-1 and 1-1: a third of them each from layer 0 to layer 1,
    # nobody from 1 to 0.
    taken = np.array([[0, 0], [0, 1], [1, 1]], dtype=np.uint8)
    assert flow(taken, TwoRooms()) == [[[0.3333, 0.3333], [0.0, 0.3333]]]
    drawn = pathways_flow(flow(taken, TwoRooms()), "Pathways")
    assert "expert 1<" in drawn
    # Bars: two experts in each of two layers; bands: the three that are not empty; and the figure's
    # and axes' paper.
    assert len(ElementTree.fromstring(drawn).findall(".//{*}g[@id]")) > 0
    assert len(re.findall(r'id="patch_\d+"', drawn)) >= 2 + 4 + 3


def test_a_comparison_says_whose_every_picture_is(result: SuiteResult) -> None:
    cards = [card_of(result, "first"), card_of(result, "second")]
    log = [{"epoch": 1, "train_loss": 2.0, "val_sa": 30.0, "val_ra_pgd10": 20.0, "router_entropy": [0.5, 1.0]}]
    shown = {
        "clean": np.zeros((2, 4, 4, 3), np.uint8),
        "attacked": np.ones((2, 4, 4, 3), np.uint8),
        "difference": np.ones((2, 4, 4, 3), np.float32),
        "before": np.array([0, 1]),
        "after": np.array([1, 1]),
        "class_names": np.array(["zero", "one"]),
    }
    analysis = analyze(route_log(result, TwoRooms()), TwoRooms())
    page = render(cards, {"second": analysis}, logs={"first": log, "second": []}, examples={"second": shown})
    assert "first: training loss" in page
    assert "how evenly the routers use the experts" in page
    assert "second: training loss" not in page
    assert "second: clean images with the model's prediction" in page.replace("&#39;", "'")
    assert "<figcaption>second. Share of the images that each expert gets" in page
    assert "128 x diff." in page  # a difference of one level fills the range
    assert Page(page).fetched == []


def test_a_failed_diagnostic_is_explained_with_what_to_do_next(result: SuiteResult) -> None:
    failed = Diagnostic("converged", "failed", "3 % more broken", "next to nothing")
    page = render([card_of(SuiteResult(**{**vars(result), "diagnostics": (failed,)}), "weak")], {})
    assert READINGS["converged"].meaning in page
    assert READINGS["converged"].next_step in page
    assert READINGS["finite"].meaning not in page


def test_layers_are_numbered_by_whole_numbers() -> None:
    # Sixteen layers on a narrow axis were once marked 0.0, 2.5, 5.0, ...
    changed = {"images": 4, "conditions": {"pgd": {"dissection": {"changed_by_layer": [float(n) for n in range(16)]}}}}
    for drawn in (expert_load([[0.5, 0.5]] * 16, "load"), changed_layers(changed)):
        axis = drawn[drawn.index('id="matplotlib.axis_1"') : drawn.index('id="matplotlib.axis_2"')]
        labels = re.findall(r"<text[^>]*>([^<]+)</text>", axis)
        assert len(labels) > 4
        assert all(label.isdigit() for label in labels if label != "MoE layer"), labels


def test_a_log_that_cannot_be_read_has_no_records(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    record = '{"epoch": 1}\n'
    for text, records in (
        (record, [{"epoch": 1}]),
        (f"{record}[]\n", [{"epoch": 1}]),
        (100_000 * "[", []),
        ('{"epo', []),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert read_log(tmp_path) == records
