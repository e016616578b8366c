"""Answers in what models write; the texts imitate what chat models, base models and small models give."""

from fractions import Fraction

import pytest

from lagless.lab.evaluation import extract_choice, extract_number, extract_yes_no

NUMBERS = [
    ("18", 18),
    ("The answer is 18.", 18),
    ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 18),
    ("8 - 4 = 4\n#### 4\n\nQuestion: Ann has 7 pens.\nAnswer: 7 + 1 = 8\n#### 8", 4),
    ("#### -5", -5),
    ("#### $1,234.50", Fraction(2469, 2)),
    ("So the total is $1,234.", 1234),
    (r"Therefore \boxed{42}.", 42),
    (r"$$\boxed{\$1{,}200}$$", 1200),
    (r"Hence \boxed{\frac{3}{4}} of the cake.", Fraction(3, 4)),
    (r"\boxed{12 \text{ apples}}", 12),
    ("**Final Answer:** 70,000", 70000),
    ("The final answer is **14**", 14),
    ("The answer is 12. Wait, that counts him twice. The answer is 11.", 11),
    ("The answer is 3 + 4 = 7 apples.", 7),
    ("The answer is 5 apples and 3 oranges.", 5),
    ("Answer: \n\n 20 dollars", 20),
    ("answer = 2.50", Fraction(5, 2)),
    ("She spent half, so $.50 is left", Fraction(1, 2)),
    ("The answer is therefore -3 degrees.", -3),
    ("It drops to $-4", -4),
    ("5-3=2", 2),
    ("That is 20% of the price.", 20),
    ("He ran 3/4 of a mile.", Fraction(3, 4)),
    ("Step 1: 10 + 5 = 15\nStep 2: 15 * 2 = 30\nSo he needs 30 minutes", 30),
    ("The answer is unclear, but about 9 people came", 9),
    ("The answer is 18.00", 18),
    ("x = 1/0", None),
    ("I'm sorry, but I cannot answer this question.", None),
    ("", None),
    ("...", None),
]

YES_NO = [
    ("yes", True),
    ("Yes.", True),
    (" no\n", False),
    ("No, because the passage says otherwise.", False),
    ("The answer is yes.", True),
    ("The answer is: **No**", False),
    (r"\boxed{yes}", True),
    ("Answer: True", True),
    ("false", False),
    ("Ethanol takes energy, so yes", True),
    ("Yes, at first sight. But the answer is no.", False),
    ("It says there is no evidence for it, and nothing else.", None),
    ("I do not know.", None),
    ("Nothing is known about that. Yesterday it was said.", None),
    ("I cannot answer that.", None),
    ("", None),
]

CHOICES = ["directional selection.", "stabilizing selection.", "12.5", "none of these"]
LETTERS = [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    (" (b) stabilizing selection", "B"),
    ("B) stabilizing selection", "B"),
    ("C: 12.5", "C"),
    ("The answer is (B).", "B"),
    ("The answer is B", "B"),
    ("The correct answer is **(D)**.", "D"),
    ("The best answer is option C because it is the mean.", "C"),
    ("Answer: A", "A"),
    ("Answer: (b)", "B"),
    (r"So \boxed{C}", "C"),
    (r"\boxed{\text{D}}", "D"),
    ("A giraffe is tall. The answer is (A). No, wait: the answer is (B).", "B"),
    ("The answer is directional selection.", "A"),
    ("The answer is 12.5", "C"),
    ("stabilizing selection", "B"),
    ("Taller animals survive, which is (A)", "A"),
    ("I would choose option D here.", "D"),
    ("A giraffe is tall, and tall animals survive.", None),
    ("Either directional selection or stabilizing selection.", None),
    ("E", None),
    ("I'm sorry, but I cannot help with that.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_number(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(("text", "answer"), YES_NO)
def test_yes_no(text, answer):
    assert extract_yes_no(text) is answer


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_choice(text, letter):
    assert extract_choice(text, CHOICES) == letter


REJECTIONS = [
    "{0} is wrong. So it is {1}",
    "{0} is incorrect, so {1}",
    "{0} is clearly not possible. {1}",
    "{0} cannot be right. The answer is {1}.",
    "The answer is not {0} but {1}",
    "Not {0}. The answer: {1}",
    "The answer is not {0}. The answer is {1}.",
    "The answer is {1}, not {0}.",
    "Rather than {0}, the answer is {1}",
]


@pytest.mark.parametrize("form", ["{}", "({})", "Option {}"])
@pytest.mark.parametrize("text", REJECTIONS)
def test_a_rejected_choice_is_no_answer(text, form):
    for wrong in "ABCD":
        for right in set("ABCD") - {wrong}:
            assert extract_choice(text.format(form.format(wrong), form.format(right)), CHOICES) == right, (wrong, right)


@pytest.mark.parametrize("text", REJECTIONS)
def test_a_rejected_number_or_word_is_no_answer(text):
    for wrong in ("5", "7", "1,200", "$3.50", "-2"):
        for right in {"5", "7", "1,200", "$3.50", "-2"} - {wrong}:
            expected = Fraction(right.replace(",", "").replace("$", ""))
            assert extract_number(text.format(wrong, right)) == expected, (wrong, right)
    for wrong, right in (("yes", "no"), ("No", "Yes"), ("true", "false")):
        assert extract_yes_no(text.format(wrong, right)) is (right in ("Yes", "true")), (wrong, right)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A is correct.", "A"), ("A is the right one", "A"), ("It is not D.", None), ("A is wrong.", None),
     ("A is not only possible, it is correct. The answer is A", "A"), ("C since A is wrong", "C")],
)  # fmt: skip
def test_what_is_left_when_something_is_rejected(text, letter):
    assert extract_choice(text, CHOICES) == letter


def test_a_choice_whose_text_contains_another_is_the_longer_one():
    assert extract_choice("The answer is the red car.", ["red", "the red car", "blue"]) == "B"
