"""Options that take one of a few names, or a size."""

from dataclasses import dataclass

import pytest

from efla_jax.choices import check_choice, check_sizes, nearest


def test_nearest_names_what_is_like_it_and_else_nothing():
    assert nearest("softpls", ["sigmoid", "softplus"]) == "; did you mean 'softplus'?"
    assert nearest("zzz", ["sigmoid", "softplus"]) == ""


def test_a_choice_passes():
    check_choice("beta", "sigmoid", ("sigmoid", "softplus"))


@pytest.mark.parametrize("value", ["sigmod", "", None, 3, ["sigmoid"]])
def test_another_value_is_refused_with_the_choices(value):
    with pytest.raises(ValueError, match=r"beta is .*; it must be one of sigmoid, softplus") as error:
        check_choice("beta", value, iter(("sigmoid", "softplus")))
    assert ("did you mean 'sigmoid'?" in str(error.value)) == (value in ("sigmod", ["sigmoid"]))


def test_sizes_are_at_least_one():
    @dataclass
    class Sizes:
        heads: int
        width: int

    check_sizes(Sizes(1, 0), "heads")
    with pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        check_sizes(Sizes(1, 0), "heads", "width")
