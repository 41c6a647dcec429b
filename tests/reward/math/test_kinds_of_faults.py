"""Kinds of answers that graders judge wrongly, each with the right verdicts.

Every pair is (reference, answer in a box, right). The kinds come from public bug reports and from
trials of other graders; the pairs after the first of a kind are siblings.
"""

import pytest

from kimi_core.config import MathConfig
from kimi_core.reward.math.reward import MathReward
from kimi_core.types import Prompt

pytest.importorskip("math_verify", reason="math-verify is not installed: kimi-core[math]")

EQUATIONS_IN_I = [
    ("w=2i", "w=5i", 0),
    ("w=2i", "i=3", 0),
    (r"x=\pm 2i", "i=0", 0),
    ("z = 3-4i", "z = -3+4i", 0),
    ("y=2i+1", "y=7i", 0),
    ("z=1+i", "z=1-i", 0),
    ("z=1+i", "z=i+1", 1),
    (r"x=\pm 2i", r"\pm 2i", 1),
    (r"x=\pm 2i", "-2i, 2i", 1),
    ("i = 5", "5", 1),
    ("i = 5", "6", 0),
    ("2i", "(1+i)^2", 1),
]
EQUATIONS = [
    ("price = 5", "price = 6", 0),
    ("42", "43=42", 0),
    ("2023", "2024 = 2023", 0),
    ("5", "2+3=5", 1),
    ("x=1, y=2", "2, 1", 0),
    ("x=1, y=2", "1, 2", 1),
    ("x=1, y=2", "y=2, x=1", 1),
    ("x=1, y=2", "y=1, x=2", 0),
    ("f(2)=5", "f(3)=5", 0),
    ("f(2)=5", "f(2)=5", 1),
    ("f(2)=5", "5", 1),
    ("x = 3", "3", 1),
    ("3", "x = 3", 1),
    ("3", "x = 4", 0),
    ("(p,q)=(3,2)", "(3,2)", 1),
    ("(p,q)=(3,2)", "(2,3)", 0),
    ("a=4,-8", "-8, 4", 1),
    ("0", "x-2y+z=0", 0),
    ("x-2y+z-1=0", "0", 0),
    ("x-2y=1", "2x-4y=2", 1),
    ("y = 2x + 1", "y = 2x", 0),
]
NAMES = [("AB", "BA", 0), ("AB", "AB", 1), ("ABC", "ACB", 0)]
NOT_A_NUMBER = [
    ("5", "[5,5]", 0),
    ("5", "(5, 5)", 0),
    ("5", "5x/x", 0),
    ("5", "5/x^0", 0),
    ("5", r"\frac{5t}{t}", 0),
    ("0", "0x", 0),
    ("42", "42_1", 0),
    ("5", "101_2", 0),
    ("42", "42_{10}", 1),
    ("5", "5 = x", 1),
    ("5", r"5 \text{ m}", 1),
    ("0.001", "10^{-3} m", 1),
    (r"\frac{1}{2}", r"\frac{\sqrt{4}}{4}", 1),
]
VALUES_AT_A_POINT = [
    (r"\sin(512x)+5", r"\sin(582x)+5", 0),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", 1),
    (r"\int_0^x t^2 dt", r"\frac{x^3}{3}", 1),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}", 1),
    (r"\frac{n!}{(n-2)!}", "n(n-1)", 1),
    ("|x|", r"\sqrt{x^2}", 1),
    ("x^{1/3}", r"\sqrt[3]{x}", 1),
]
OTHER_SHAPES = [
    (r"50\%", r"\frac12", 1),
    (r"50\%", r"\frac{1}2", 1),
    ("1.25", r"1\frac14", 1),
    ("1:30 PM", "1:30 pm", 1),
    ("1 PM", r"1:00\text{ p.m.}", 1),
    ("1:30 PM", "1:30 AM", 0),
    ("1:30 PM", "1:31 PM", 0),
    (r"\overline{AB}", "AB", 1),
    (r"\overline{AB}", "BA", 0),
    (r"\triangle ABC", "ABC", 1),
    (r"\triangle ABC", "ACB", 0),
]
UNREADABLE = [
    ("5", "i<0", 0),
    ("5", r"1+i \ge 2", 0),
    ("5", "[i,2]", 0),
    ("x<2", "i<2", 0),
    ("5", r"\max(i, 2)", 0),
    ("5", "{" * 300, 0),
    ("5", r"\frac{" * 100, 0),
]
TEXTS = [
    (r"2\text{ hours }5\text{ minutes}", r"2\text{ hours }50\text{ minutes}", 0),
    (r"2\text{ hours }5\text{ minutes}", r"2\text{ hours }5\text{ minutes}", 1),
    (r"2\text{ hours }5\text{ minutes}", r"2\text{ hour }5\text{ minute}", 1),
    ("34", r"34\text{ apples and }5\text{ pears}", 0),
    ("34", r"34\text{ apples}", 1),
    (r"3 \text{ if } n \text{ is even}", r"3 \text{ if } n \text{ is odd}", 0),
    (r"3 \text{ if } n \text{ is even}", r"3 \text{ if } n \text{ is even}", 1),
    (r"3 \text{ if } n \text{ is even}", "3", 0),
    (r"\text{June 20}", "June 20", 1),
    (r"\text{June 20}", "June 21", 0),
    (r"6 \text{ and } 8", "6, 8", 1),
    (r"6 \text{ and } 8", "6, 9", 0),
]
UNITS = [
    (r"\sqrt{2}\text{ cm}", r"\sqrt{2}\text{ m}", 0),
    (r"\sqrt{2}\text{ cm}", r"\sqrt{2}\text{ cm}^2", 0),
    (r"\sqrt{2}\text{ cm}", r"\sqrt{2}", 1),
    (r"\sqrt{2}\text{ cm}", r"\sqrt{2}\text{ centimeters}", 1),
    (r"\sqrt{2}\text{ km/h}", r"\sqrt{2}\text{ kilometers per hour}", 1),
    (r"\sqrt{2}\text{ cm}^2", r"\sqrt{2}\text{ square centimeters}", 1),
    (r"\sqrt{2}\text{ cm}^2", r"\sqrt{2}\text{ cm}^2", 1),
    (r"\$5", "5 cents", 0),
    (r"\$5", "5 dollars", 1),
    (r"\$5", "5", 1),
    ("5 cents", r"\$5", 0),
    ("5 €", "5 dollars", 0),
    ("60 km/h", r"60\text{ kilometers per hour}", 1),
    ("60 km/h", r"60\text{ miles per hour}", 0),
    ("60 km/h", "60 miles per hour", 0),
    ("60 km/h", "60 km per hour", 1),
]
SMALL_NUMBERS = [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", 0),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{99}}", 1),
    (r"\frac{1}{2^{99}}", r"2^{-99}", 1),
    ("1/2004!", "1/2006!", 0),
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}", 0),
    (r"10^{-8}\sqrt{2}", r"10^{-8}\sqrt{3}", 0),
]
RESTATED = [
    ("56088", r"123\cdot 456", 0),
    ("42", "17+25", 0),
    ("1/3", r"\int_0^1 x^2\,dx", 0),
    ("2x", r"\frac{d}{dx} x^2", 0),
    ("720", "6!", 0),
    ("10", r"\binom{5}{2}", 0),
    ("8", "2 \\times 4", 0),
    ("55", r"\sum_{k=1}^{10} k", 0),
    ("42", r"\prod_{k=1}^{1} 42", 0),
    ("5", r"\log_2 32", 0),
    ("3", r"\max(3, 2)", 0),
    ("-2", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", 0),
    ("42", "--42", 0),
    ("42", "17+25=42", 1),
    ("-5", "-5", 1),
    ("0.001", "10^{-3}", 1),
    ("1500", r"1.5 \times 10^3", 1),
    ("x+1", "1+x", 1),
]
PLAIN_TEXT = [
    (r"\frac{\pi}{2}", "pi/2", 1),
    (r"-2\pi", "-2*pi", 1),
    ("e^{16}", "exp(16)", 1),
    (r"\sqrt{7}", "sqrt(7)", 1),
    (r"\frac{\pi}{2}", "pi/3", 0),
    ("5/33", r"0.\overline{15}", 1),
    ("5/33", r"0.\overline{16}", 0),
    ("1/6", r"0.1\overline{6}", 1),
    ("11111111100", r"11,\! 111,\! 111,\! 100", 1),
    ("B", r"\text{(B)}\ 12", 1),
    ("B", r"\text{(C)}\ 12", 0),
    ("B", "(B) 12", 1),
]
TEXT_THAT_CHANGES_A_NUMBER = [
    ("5", r"5\text{ or more}", 0),
    ("5", r"5\text{ million}", 0),
    ("5", "5 million", 0),
    ("5", r"5\text{ and a half}", 0),
    ("5", r"5\text{6}", 0),
    ("5", r"5\text{ at most}", 0),
    ("5", r"5\text{ squared}", 0),
    ("5", r"5\text{ is wrong}", 0),
    ("5", r"5\text{, no, 6}", 0),
    (r"\sqrt{2}", r"\sqrt{2}\text{ or more}", 0),
    (r"5\text{ or more}", "5", 0),
    ("5", r"5\text{ times}", 1),
    ("5", r"5\text{ distinct sequences}", 1),
    ("5000000", r"5\text{ million}", 1),
    (r"5\text{ million dollars}", r"\$5{,}000{,}000", 1),
    ("60", "5 dozen", 1),
    ("5", r"\text{5}", 1),
]
SIGNS_THAT_A_PARSER_DROPS = [
    ("x'", "x", 0),
    ("f'(2)", "f(2)", 0),
    ("f'(x)+g(x)", "f(x)+g'(x)", 0),
    ("f'(x)+g(x)", "g(x)+f'(x)", 1),
    ("A^T", "A", 0),
    ("2^T", "2", 0),
    ("2^T", "2^{T}", 1),
    ("5", r"5\ldots", 0),
    ("5", r"\ldots 5", 0),
    ("5", "5'", 0),
    ("42", "42_x", 0),
    ("42", r"42_{max}", 0),
    ("5", r"x |_{x=5}", 0),
    (r"\angle ABC", r"\angle ACB", 0),
    (r"\angle ABC", r"\angle CBA", 1),
    (r"\overrightarrow{AB}", r"\overrightarrow{BA}", 0),
    ("2024-01-05", "2018", 0),
    ("2024-01-05", "2024-1-5", 1),
]
CAPITALS = [
    (r"\frac{R}{r}", "1", 0),
    (r"\frac{R}{r}", r"\frac{r}{R}", 0),
    ("R+r", "2r", 0),
    ("R+r", "r+R", 1),
    (r"\Delta x - \delta x", "0", 0),
    ("A_1 + a_1", "2a_1", 0),
    ("A_1 + a_1", "a_1 + A_1", 1),
    ("X^2", "x^2", 0),
]
UPRIGHT = [
    (r"3+2\mathrm{i}", "5", 0),
    (r"3+2\mathrm{i}", "3+2i", 1),
    (r"2\mathrm{e}", "2", 0),
    (r"\mathrm{e}^2", "e^2", 1),
    ("3", r"3\mathrm{x}", 0),
    (r"\operatorname{arcsin} x", r"\arcsin x", 1),
    (r"\operatorname{arcsin} x", r"\arccos x", 0),
    (r"42\,\frac{\text{m}}{\text{s}}", "42 m/s", 1),
    (r"42\,\frac{\text{m}}{\text{s}}", "42 km/s", 0),
]
BRACKETS_AND_NAMES = [
    ("(1,2)", r"\{1,2\}", 0),
    (r"\{1,2\}", "(1,2)", 0),
    ("(1,2,3)", r"\{1,2,3\}", 0),
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("(x,y)=(1,2)", "x=1, y=2", 1),
    ("(x,y)=(1,2)", "(y,x)=(2,1)", 1),
    ("(x,y)=(1,2)", "(y,x)=(1,2)", 0),
    ("x=1, y=2", "(1,2)", 1),
    ("34", "34 = x", 1),
    ("34", "33 = x", 0),
    ("x+y=3, x-y=1", "x-y=1, x+y=3", 1),
    (r"x<1 \text{ or } x>2", r"x<1 \text{ and } x>2", 0),
    (r"x<1 \text{ or } x>2", r"x<1 \text{ or } x>2", 1),
    ("A", "A. 12", 1),
    ("A", "B. 12", 0),
]
LARGE_NUMBERS = [
    ("2^{1000}", "4^{500}", 1),
    ("2^{1000}", "2^{1000}+1", 0),
    ("10^{1000}+1", "100^{500}", 0),
    ("e^{2000}", "e^{2000}+1", 0),
    ("3^{2048}", "9^{1023}", 0),
    ("7^{7^{7}}", "7^{7^{8}}", 0),
]
TEMPERATURES = [
    (r"8^{\circ}\mathrm{C}", "8", 1),
    (r"8^\circ C", r"8^\circ", 1),
    ("8°C", "8", 1),
    ("8", r"8^\circ\text{C}", 1),
    ("8", "8 °C", 1),
    ("8", "8 degrees Celsius", 1),
    (r"8^\circ\text{C}", "8 celsius", 1),
    (r"8^\circ\text{C}", r"8^\circ \text{F}", 0),
    (r"8^\circ\text{C}", "8 degrees fahrenheit", 0),
    (r"8^\circ C", r"9^\circ C", 0),
    (r"8^\circ C", "8 m", 0),
]
NUMBERS_AS_WORDS = [
    (r"\text{four}", "4", 1),
    ("4", r"\text{Four}", 1),
    ("4", "four apples", 1),
    ("twelve", "12", 1),
    ("4", "five", 0),
    ("four", "five", 0),
    ("1", "one half", 0),
    ("2", "two thirds", 0),
    ("20", "twenty one", 0),
    ("20", "twenty-one", 0),
    ("4", "four or five", 0),
    ("6", "sixteen", 0),
    ("6", "sixty", 0),
]
UNIONS = [
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2", 1),
    (r"(-\infty,1)\cup(2,\infty)", "x<1, x>2", 1),
    (r"(-\infty,1)\cup(2,\infty)", r"x>2 \text{ or } 1>x", 1),
    (r"(-\infty,1]\cup[2,\infty)", r"x\le1 \text{ or } x\geq 2", 1),
    (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)", 1),
    (r"(-1,0)\cup(2,3]", r"-1<y<0 \text{ or } 2<y\le 3", 1),
    (r"(-1,0)\cup(2,3]", r"0>y>-1 \text{ or } 3\ge y>2", 1),
    (r"(-1,0)\cup(2,3]", r"-1<y<0 \text{ or } 2\le y\le 3", 0),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>3", 0),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x\ge2", 0),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ and } x>2", 0),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } y>2", 0),
    (r"(-\infty,1)\cup(2,\infty)", "x<1", 0),
]
BARS = [
    ("-1<x<1", "|x|<1", 1),
    ("(-1,1)", "|x|<1", 1),
    ("|x|<1", "-1 < x < 1", 1),
    ("|x|<1", "1 > x > -1", 1),
    ("[-2,2]", r"|x| \le 2", 1),
    (r"|x| \le 2", r"\lvert x \rvert \leq 2", 1),
    (r"(-\infty,-1)\cup(1,\infty)", "|x|>1", 1),
    ("x<-1 or x>1", r"\left|x\right|>1", 1),
    (r"|x|\ge \sqrt{2}", r"x \le -\sqrt{2} \text{ or } x \ge \sqrt{2}", 1),
    ("-1<x<1", "|x|<2", 0),
    ("-1<x<1", r"|x|\le 1", 0),
    ("-1<x<1", "|x|>1", 0),
    ("-1<x<1", "|y|<1", 0),
    ("|x|>1", "x>1", 0),
    ("|x|>1", "-1<x<1", 0),
    ("-1<x<1", "|x-1|<1", 0),
    ("-1<x<1", "1>x>-1", 1),
    ("x>2", "2<x", 1),
    (r"x \le 2", "x<=2", 1),
    (r"|x| \le 2", "-2<=x<=2", 1),
    ("x>2", "x>=2", 0),
    (r"x \ge 2", "2<x", 0),
    ("a<x<b", "b>x>a", 1),
    ("x>2", "y>2", 0),
    ("1<x<2", "2<x<1", 0),
    ("2<x, x<5", "1<x, x<9", 0),
    ("2<x, x<5", "x<9, 1<x", 0),
    ("x>2 or x<1", "x<1 or x>2", 1),
]
FORMS = [
    ("y=x", "x=y", 1),
    ("AB=CD", "CD = AB", 1),
    ("y=x", "x=z", 0),
    (r"\frac{dy}{dx}=2x", "2x", 1),
    (r"\frac{dy}{dx}=2x", r"\frac{dy}{dx}=3x", 0),
    ("(1,2)", r"\langle 1,2\rangle", 1),
    (r"\vec{v}=(1,2)", r"\left\langle 1, 2 \right\rangle", 1),
    ("(1,2)", r"\langle 2,1\rangle", 0),
    ("9:00 a.m.", r"9:00 \text{ AM}", 1),
    ("9:00 a.m.", r"9:00 \text{ PM}", 0),
    ("7", "7,", 1),
    ("7", r"7 \\", 1),
    ("7", "7, 8,", 0),
]
KINDS = {
    "values_at_a_point": VALUES_AT_A_POINT,
    "other_shapes": OTHER_SHAPES,
    "not_a_number": NOT_A_NUMBER,
    "text_that_changes_a_number": TEXT_THAT_CHANGES_A_NUMBER,
    "signs_that_a_parser_drops": SIGNS_THAT_A_PARSER_DROPS,
    "capitals": CAPITALS,
    "upright": UPRIGHT,
    "brackets_and_names": BRACKETS_AND_NAMES,
    "large_numbers": LARGE_NUMBERS,
    "equations_in_i": EQUATIONS_IN_I,
    "equations": EQUATIONS,
    "names": NAMES,
    "unreadable": UNREADABLE,
    "texts": TEXTS,
    "units": UNITS,
    "small_numbers": SMALL_NUMBERS,
    "restated": RESTATED,
    "plain_text": PLAIN_TEXT,
    "temperatures": TEMPERATURES,
    "numbers_as_words": NUMBERS_AS_WORDS,
    "unions": UNIONS,
    "bars": BARS,
    "forms": FORMS,
}
WHOLE = [
    (r"\boxed{1} and \boxed{2}", r"\boxed{2}", 0),
    (r"\boxed{1} and \boxed{2}", r"\boxed{1} and \boxed{2}", 1),
    ("1, 2", r"\boxed{1} and \boxed{2}", 1),
    ("1", r"\boxed{1} or \boxed{2}", 0),
    ("2", r"\boxed{1} or \boxed{2}", 0),
    ("34", "**Answer:**\n\n34", 1),
    ("34", "The answer is **34**.", 1),
    ("34", "<answer>34</answer>", 1),
    ("34", "The answer is:\n\\[ 34 \\]", 1),
    ("34", r"<think>maybe \boxed{12}</think> The answer is 34.", 1),
    ("12", r"<think>maybe \boxed{12}</think> The answer is 34.", 0),
    ("34", "Final Answer: The largest $n$ is 34.", 1),
    ("34", "The answer is 33 or 34.", 0),
    ("60 km/h", "The answer is 60 miles per hour.", 0),
    ("60 km/h", "The speed is 60 km per hour.", 1),
    ("12", "There are 12 distinct sequences that meet the given conditions.", 1),
    ("34", "The answer is not 34.", 0),
    ("34", "The answer is 34</s>", 1),
    ("34", "The answer is 34<end_of_turn> The answer is 35", 1),
    ("34", "So it is $33$ or rather $34$.", 0),
]
AMOUNTS_OF_MONEY = [
    ("50", "10 books * $5 = $50", 1),
    ("5", "10 books * $5 = $50", 0),
    ("50", r"10 books * \$5 = \$50", 1),
    ("50", "Total: $5 * 10 = $50", 1),
    ("15", "The answer is $5 + $10 = $15.", 1),
    ("10", "The answer is $5 + $10 = $15.", 0),
    ("5", "$2 + $3 = $6", 0),
    ("6", "3 cups at €2 = €6", 1),
    ("10", "Anna pays 4 x $2.50 = $10.00.", 1),
    ("1234.5", "Profit = $1,234.50", 1),
    ("30", "4 hours * $5 = $20 = $30", 1),
    ("20", "4 hours * $5 = $20 = $30", 0),
    ("60", "10 books * $5 = $50 or 12 = $60", 0),
    ("3", "She pays $5 and gets $3 back", 0),
    ("5", "The answer is $x = 5$", 1),
    ("7", "The answer is $5$ or $7$", 0),
]
SEVERAL_FORMULAS = [
    ("7", "The answer is $5$ and $7$", 0),
    ("5, 7", "The answer is $5$ and $7$", 1),
    ("5, 7", "The solutions are $5$ and $7$", 1),
    ("7", "The solutions are $5$ and $7$", 0),
    ("7", "$5$, $7$", 0),
    ("x=5 or x=7", "The answer is $x=5$ or $x=7$.", 1),
    ("5", r"The answer is \(5\) or \(7\)", 0),
    ("5, 7", r"The answer is \(5\) and \(7\).", 1),
    ("5", "The answer is $$5$$ and $$7$$", 0),
    ("5", r"The answer is \(5\), because \(x\) is 3.", 1),
    ("7", "Hence $a=3$, $b=4$, and the sum is $7$.", 1),
]


@pytest.fixture(scope="module")
def reward():
    made = MathReward(MathConfig())
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kind", "pair"), [(kind, pair) for kind, pairs in KINDS.items() for pair in pairs]
)
def test_answers(reward, kind, pair):
    reference, answer, right = pair
    assert reward(Prompt(0, "", reference), f"Therefore \\boxed{{{answer}}}.") == right


@pytest.mark.parametrize("pair", WHOLE + AMOUNTS_OF_MONEY + SEVERAL_FORMULAS)
def test_whole_responses(reward, pair):
    reference, response, right = pair
    assert reward(Prompt(0, "", reference), response) == right


@pytest.mark.parametrize(("reference", "answer"), [(r, a) for r, a, right in RESTATED[:8]])
def test_a_restated_computation_counts_by_a_setting(reference, answer):
    made = MathReward(MathConfig(unevaluated=True))
    assert made.equal(reference, answer)
    made.close()
