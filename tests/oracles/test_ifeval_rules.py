"""IFEval's rules are those of the published checker, as lm-eval carries it, on random replies.

Without its three that need NLTK's or langdetect's models: sentences, capital words, languages.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.evaluation.marks import ifeval

registry = pytest.importorskip(
    "lm_eval.tasks.ifeval.instructions_registry", reason="pip install lm_eval langdetect"
)

AT_LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": AT_LEAST}),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": LESS}),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}),
    ("keywords:letter_frequency", {"letter": "c", "let_frequency": 2, "let_relation": AT_LEAST}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"num_words": 4, "relation": AT_LEAST}),
    ("length_constraints:number_words", {"num_words": 4, "relation": LESS}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "cat"},
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 1}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Cat?"}),
    ("startend:end_checker", {"end_phrase": "Dog."}),
    ("startend:quotation", {}),
    ("punctuation:no_comma", {}),
]
PIECES = [
    "cat", "Cat?", "dog", "Dog.", " ", "\n", "\n\n", "***", "******", "*", "**", "- ", "* ", "[a]", "[",
    "]", "<<", ">>", "P.S.", "p. p.s", "Part 1", "Part", ",", '"', "```", "```json", "{", "}", "[1]", "1",
    "My answer is no.", "'", "!", "中文",
]  # fmt: skip


def test_every_rule_has_its_name() -> None:
    assert set(ifeval.RULES) == set(registry.INSTRUCTION_DICT)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@settings(deadline=None, max_examples=400)
def test_rules(reply: str) -> None:
    for name, arguments in CASES:
        theirs = registry.INSTRUCTION_DICT[name](name)
        theirs.build_description(**arguments)
        (ours,) = ifeval.read({"instruction_id_list": [name], "kwargs": [arguments]})
        if reply.strip():  # both call an empty reply wrong before they ask a rule
            assert ours.check(reply) == bool(theirs.check_following(reply)), name
