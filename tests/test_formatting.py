"""Numbers as people read them: one way for cards, reports and plans."""

import pytest

from manticore_hf.utils.formatting import listed, plain_value, short_bytes, short_count, short_duration

COUNTS = {
    0: "0", 1: "1", 999: "999", 1000: "1 k", 1234: "1.23 k", 12_345: "12.3 k", 999_499: "999 k", 999_500: "1000 k",
    1_000_000: "1 M", 1_234_567: "1.23 M", 2.5e9: "2.5 G", 7e12: "7 T", 9.99e14: "999 T", 1.2e15: "1200 T",
}  # fmt: skip
BYTES = {
    None: "-", 0: "0 B", 500: "500 B", 999.4: "999 B", 1000: "1 kB", 5e6: "5 MB", 100e6: "100 MB", 5e9: "5 GB",
    80e9: "80 GB", 1.234e9: "1.23 GB", 2**30: "1.07 GB", 3e12: "3 TB",
}  # fmt: skip
DURATIONS = {
    None: "not recorded", 0: "0 s", 0.3: "under 1 s", 1: "1 s", 59.6: "60 s", 119.4: "119 s", 120: "2 min",
    1800: "30 min", 7199: "120 min", 7200: "2.0 h", 18_000: "5.0 h", 359_999: "100.0 h", 360_000: "4.2 days",
    864_000: "10.0 days",
}  # fmt: skip


@pytest.mark.parametrize(
    "function, cases",
    [(short_count, COUNTS), (short_bytes, BYTES), (short_duration, DURATIONS)],
    ids=["count", "bytes", "duration"],
)
def test_edge_values(function, cases):
    assert {value: function(value) for value in cases} == cases


def test_a_time_that_is_not_known_has_a_name_of_its_own():
    assert short_duration(None, "?") == "?" and short_duration(0, "?") == "0 s"


def test_settings_are_no_python():
    assert [plain_value(one) for one in (["a", "b"], ("a",), [], 2, None)] == ["a, b", "a", "", "2", "None"]


def test_names_in_a_sentence():
    assert [listed(names) for names in (["a"], ("a", "b"), iter("abc"))] == ["a", "a and b", "a, b and c"]
