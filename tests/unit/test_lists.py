"""Lists of ids as the kernel and numactl write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machines import cpumap
from numaload.errors import UsageError
from numaload.linux.lists import MAX_ID, format_list, parse_list, parse_map, select

LISTS = {
    "0": [0],
    "0-3": [0, 1, 2, 3],
    "0,2-3": [0, 2, 3],
    "5,0-1,1-2": [0, 1, 2, 5],
    " 1 , 3-4 \n": [1, 3, 4],
    "0,,2,": [0, 2],
    "250-255\n\0": [250, 251, 252, 253, 254, 255],
    "": [],
    "\n": [],
    f"{MAX_ID - 1}": [MAX_ID - 1],
}


@pytest.mark.parametrize("text", LISTS)
def test_parse_list(text: str) -> None:
    assert parse_list(text) == LISTS[text]


@pytest.mark.parametrize(
    "text",
    ["x", "-1", "1-", "3-1", "0-3-5", "1.0", "+0", "1_0", "0x1", "\u0663", "0 1", f"{MAX_ID}",
     "0-999999999999", "9" * 5000, "0-" + "9" * 5000, f"0-{MAX_ID - 1},0"],
)  # fmt: skip
def test_parse_list_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_list(text)


@given(st.sets(st.integers(0, 2000)))
def test_lists_come_back(ids: set[int]) -> None:
    assert parse_list(format_list(ids)) == sorted(ids)


@pytest.mark.parametrize(
    ("ids", "text"),
    [([], ""), ([7], "7"), ([3, 2, 0], "0,2-3"), ([0, 1, 3, 4, 5, 9], "0-1,3-5,9")],
)
def test_format_list_is_as_short_as_the_kernel_s(ids: list[int], text: str) -> None:
    assert format_list(ids) == text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("00000000,0000000f\n\0", [0, 1, 2, 3]),
        ("1,00000001", [0, 32]),
        ("80000000,00000000,00000000", [95]),
        ("0", []),
        ("", []),
    ],
)
def test_parse_map(text: str, ids: list[int]) -> None:
    assert parse_map(text) == ids


@pytest.mark.parametrize("text", ["x", "0x1f", "-1", "1_0", "1;2", "f f", "1" * 16385])
def test_parse_map_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is no map of ids"):
        parse_map(text)


@given(st.sets(st.integers(0, 255)))
def test_maps_say_the_same_as_lists(ids: set[int]) -> None:
    assert parse_map(cpumap(format_list(ids))) == sorted(ids)


EVERYTHING, KNOWN = [0, 8], [0, 8, 250]
SELECTIONS = {
    "all": [0, 8],
    "local": [8],
    "0": [0],
    "8,0": [0, 8],
    "250": [250],  # known, though not part of everything
    "!0": [8],
    "!250": [0, 8],
    "!1-7": [0, 8],
}


@pytest.mark.parametrize("text", SELECTIONS)
def test_select(text: str) -> None:
    assert select(text, everything=EVERYTHING, known=KNOWN, local=8) == SELECTIONS[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "node 1 is not usable here; usable: 0,8,250"),
        ("0-3", "node 1-3 is not usable here"),
        ("!0,8", "no node is left"),
        ("", "expected all, local, 0,2-3 or !1"),
        ("!", "expected all"),
        ("!all", "expected all"),
        ("ALL", "expected all"),
        ("+0", "expected all"),
    ],
)
def test_select_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(text, everything=EVERYTHING, known=KNOWN, local=0)


def test_all_of_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="no node is left; usable: none"):
        select("all", everything=[], known=[], local=0)
