import pytest
from data_config import make_config, sentence

from nightshift import filtering
from nightshift.fixed.config import MixtureRule


def select(tmp_path, documents, **overrides):
    filter = make_config(tmp_path, **overrides).filter
    return list(filtering.select(documents, filter))


def test_the_default_filter_keeps_every_document_once(tmp_path):
    documents = [(f"{i}", sentence(i)) for i in range(20)]
    assert select(tmp_path, documents) == [(text, 1) for _, text in documents]


def test_documents_outside_the_length_limits_are_left_out(tmp_path):
    documents = [("a", "x" * 5), ("b", "x" * 6), ("c", "x" * 9)]
    limits = {"filter__min_chars": 6, "filter__max_chars": 8}
    assert select(tmp_path, documents, **limits) == [("x" * 6, 1)]


def test_repeated_lines_are_counted_without_blank_ones():
    assert filtering.repeated_line_frac("a\n\na\nb\n a \n") == 0.5
    assert filtering.repeated_line_frac("") == 0.0


def test_letters_and_spaces_are_letters_in_every_script():
    assert filtering.letter_frac("\u00e4b \u6f22") == 1.0
    assert filtering.letter_frac("a1|2") == 0.25


def test_the_clean_filter_drops_tables_and_boilerplate(tmp_path):
    table, boilerplate = "| 12 | 34 |\n" * 50, "Click here to subscribe\n" * 50
    clean = {"filter__max_repeated_line_frac": 0.3, "filter__min_letter_frac": 0.8}
    documents = [("t", table), ("b", boilerplate), ("s", sentence(1))]
    assert select(tmp_path, documents, **clean) == [(sentence(1), 1)]


def test_the_first_matching_rule_gives_the_weight():
    rules = [MixtureRule(match="18*", weight=2.0), MixtureRule(match="1*", weight=0.0)]
    weights = [filtering.mixture_weight(name, rules) for name in ("1801-J", "1790-W", "2020-T")]
    assert weights == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
def test_a_weight_is_the_mean_number_of_copies(weight):
    copies = [filtering.num_copies(sentence(i), weight) for i in range(1500)]
    assert sum(copies) / len(copies) == pytest.approx(weight, abs=0.05)
    assert set(copies) <= {int(weight), int(weight) + 1}


def test_a_larger_fraction_keeps_what_a_smaller_one_kept():
    texts = [sentence(i) for i in range(300)]
    small, large = ([filtering.num_copies(t, w) for t in texts] for w in (0.2, 0.6))
    assert all(a <= b for a, b in zip(small, large, strict=True))
