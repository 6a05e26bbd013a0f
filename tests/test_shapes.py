"""Letters of shape suffixes: one meaning each, and a legend in every file that uses them."""

import re

import pytest
import shapes

STATED = {"B": "batch", "N": "experts", "R": "routers"}


def test_every_letter_of_a_shape_is_in_the_legend_of_its_file() -> None:
    assert shapes.problems() == []


@pytest.mark.parametrize(
    ("legend", "problem"),
    [
        ("B batch, N experts, R routers", None),
        ("B batch (of a step, say), N experts, R routers (few)", None),
        ("B batch, R routers", "the legend at the head lacks 'N experts'"),
        ("B batch, N images, R routers", "the legend says 'N images' for 'N experts'"),
        ("B batch, N experts, R routers, H heads", "CONTRIBUTING.md does not say what the letter H means"),
    ],
)
def test_a_legend_that_does_not_fit_is_named(legend: str, problem: str | None) -> None:
    source = f'''"""A file.\n\nShape suffixes: {legend}.\n"""\nlogits_BRN = margins_BR = 0\nHTTP_NOT_FOUND = 404\n'''
    assert list(shapes.wrong_legend(source, STATED)) == ([] if problem is None else [problem])


def test_a_legend_lists_no_letter_that_stands_nowhere() -> None:
    source = '''"""Shape suffixes: B batch, N experts, R routers."""\nlogits_BN = 0  # [R] would do\n'''
    assert list(shapes.wrong_legend(source, STATED)) == []
    (problem,) = shapes.wrong_legend(re.sub(r"#.*", "", source), STATED)
    assert problem == "no shape has the letter R of the legend"
